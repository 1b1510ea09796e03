"""Writes the `README.md` of an exported model: its training data, optimizer and settings."""

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.runs import write_text

CARD = "README.md"
_TEXT = """\
---
{front}
---

# {title}

{summary}

| | |
|---|---|
{table}

```python
import transformers

model = transformers.AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = transformers.AutoTokenizer.from_pretrained("FOLDER")
```

The license is that of the data and, where there is one, of the base model.
"""


def write(
    folder: Path, title: str, summary: str, facts: Mapping[str, Any], base: str | None = None
) -> None:
    """Writes the model card, in the format of the Hugging Face Hub. It contains no local path.

    Args:
        folder: The folder of the model.
        title: The title of the card.
        summary: One or two sentences about the model.
        facts: The rows of its table. Rows with the value None are omitted.
        base: The name of the model that training started from.
    """
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    head |= {"tags": ["muon_jax"]} | ({"base_model": base} if base else {})
    libraries = (f"{name} {importlib.metadata.version(name)}" for name in ("jax", "optax", "flax"))
    rows = {**facts, "Software": f"muon_jax, with {', '.join(libraries)}"}
    text = _TEXT.format(
        front="\n".join(f"{name}: {json.dumps(value)}" for name, value in head.items()),
        title=title,
        summary=summary,
        table="\n".join(f"| {n} | {_cell(x)} |" for n, x in rows.items() if x is not None),
    )
    write_text(folder / CARD, text)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_cell(x)}" for name, x in value.items())
    text = f"{value:,}" if isinstance(value, int) else str(value)
    text = f"{value:.4g}" if isinstance(value, float) else text
    return " ".join(text.split()).replace("|", "\\|")
