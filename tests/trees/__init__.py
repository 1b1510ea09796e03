"""Parameter trees of 40 public model families, by name, in the notation of `text`."""

from trees import big_vision, gemma, haiku_equinox, hugging_face, levanter, maxtext, t5x
from trees import hugging_face_flax as flax

FAMILIES = {
    name: leaves
    for library in (maxtext, levanter, hugging_face, flax, t5x, big_vision, gemma, haiku_equinox)
    for name, leaves in library.FAMILIES.items()
}
