"""Encoders in the layouts of the PyTorch world, as safetensors in and out; torch is never imported."""

from jaxmed.interop.layouts import FORMATS, export_file, import_file, load_file
from jaxmed.interop.verify import model_card, verify_export

__all__ = ['FORMATS', 'export_file', 'import_file', 'load_file', 'model_card', 'verify_export']
