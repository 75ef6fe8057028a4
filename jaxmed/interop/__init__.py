"""Encoders in the layouts of the PyTorch world, as safetensors in and out; torch is never imported."""

from jaxmed.interop.verify import model_card, verify_export
from jaxmed.interop.weight_formats import FORMATS, export_file, import_file, load_file

__all__ = ['FORMATS', 'export_file', 'import_file', 'load_file', 'model_card', 'verify_export']
