"""Export of a trained model, a model card, and an HTTP server."""

from lightning_fl.serving.export import FORMATS, Format, export
from lightning_fl.serving.loading import example_inputs, find_checkpoint, load_module
from lightning_fl.serving.model_card import model_card

__all__ = ["FORMATS", "Format", "example_inputs", "export", "find_checkpoint", "load_module", "model_card"]
