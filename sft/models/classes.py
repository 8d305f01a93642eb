"""Chooses the class of transformers for a base, and refuses bases that do not write text.

A vision-language base is loaded as what it is, with its towers, so that what is saved is that model
again. A text step never reaches them.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)
from transformers.models.auto import modeling_auto

from sft.errors import ModelError

# In this order: a type with a class for media and one for text alone is saved as the former.
AUTO_CLASSES = (AutoModelForMultimodalLM, AutoModelForCausalLM)
EXPECTED = "expected a model that writes text from left to right, such as Llama, Qwen or Gemma"


def auto_class(architecture: Any) -> Any:
    """Returns transformers' auto class for a configuration: the one whose class its files name.

    For files that name another class, or none, it is the first that knows the type.
    """
    own = getattr(architecture, "auto_map", None) or {}  # of code that comes with the model
    fitting = [
        auto
        for auto in AUTO_CLASSES
        if auto.__name__ in own or type(architecture) in auto._model_mapping
    ]
    named = (getattr(architecture, "architectures", None) or [None])[0]
    for auto in () if own else fitting:
        if getattr(auto._model_mapping[type(architecture)], "__name__", None) == named:
            return auto
    return fitting[0] if fitting else AutoModelForCausalLM


def auto_name(architecture: Any) -> str:
    """Returns the name of the auto class by which others load what `auto_class` loads."""
    found, mapping = auto_class(architecture), AutoModelForImageTextToText._model_mapping
    if found is AutoModelForMultimodalLM and type(architecture) in mapping:
        found = AutoModelForImageTextToText  # the usual one, of the same class
    return str(found.__name__)


def from_config(architecture: Any, **options: Any) -> Any:
    """Returns a model of random weights."""
    return auto_class(architecture).from_config(architecture, **options)


def refuse_other_than_decoders(architecture: Any, name: str) -> None:
    """Raises ModelError for a configuration of a model that cannot write text after a prompt."""
    kind = type(architecture)
    if getattr(architecture, "auto_map", None):
        return  # its code is not known here
    if architecture.is_encoder_decoder:
        why = "is an encoder-decoder, which reads the prompt apart from the answer"
    elif kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING and not getattr(
        architecture, "is_decoder", False
    ):
        why = "is an encoder, whose tokens see those that follow"
    elif not any(kind in auto._model_mapping for auto in AUTO_CLASSES):
        why = "has no class in transformers that writes text"
    else:
        return
    raise ModelError(f"model.name: {name!r} ({architecture.model_type}) {why}; {EXPECTED}")
