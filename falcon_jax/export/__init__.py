"""Out of JAX: models as files that other programs run."""

from falcon_jax.export.files import FORMATS as FORMATS
from falcon_jax.export.onnx_file import OnnxFile as OnnxFile
from falcon_jax.export.onnx_file import onnx as onnx
from falcon_jax.export.onnx_file import onnx_int8 as onnx_int8
from falcon_jax.export.safetensors_file import load_safetensors as load_safetensors
from falcon_jax.export.safetensors_file import safetensors as safetensors
from falcon_jax.export.serialized import StablehloFile as StablehloFile
from falcon_jax.export.serialized import TfliteFile as TfliteFile
from falcon_jax.export.serialized import stablehlo as stablehlo
from falcon_jax.export.serialized import tflite as tflite
from falcon_jax.export.stored import export_stored as export_stored
from falcon_jax.export.stored import from_pretrained as from_pretrained
from falcon_jax.export.stored import push_to_hub as push_to_hub
from falcon_jax.export.stored import save_pretrained as save_pretrained
