"""`README.md` of an exported folder: what the model was trained on, and how."""

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
    """Writes the card of a model, in the form that the Hugging Face Hub reads; it names no path.

    Args:
        folder: of the model.
        title: of the model.
        summary: a sentence or two.
        facts: rows of its table; those that are None are left out.
        base: name of the model that it was made of.
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
