"""Model files: diffusers folders, single files and Hub ids in; networks, facts and the other layout out."""

from fastldm.checkpoint.convert import convert
from fastldm.checkpoint.info import ModelInfo, inspect
from fastldm.checkpoint.load import Components, load_components
from fastldm.checkpoint.save import save_folder

__all__ = ["Components", "ModelInfo", "convert", "inspect", "load_components", "save_folder"]
