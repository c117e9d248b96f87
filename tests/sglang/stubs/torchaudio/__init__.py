"""Stands for torchaudio, which SGLang imports and never uses here."""

from torchaudio import functional as functional
from torchaudio import transforms as transforms

__version__ = "0.0"
