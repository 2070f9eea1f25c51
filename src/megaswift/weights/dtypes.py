"""Number formats: their names in torch, in file headers, in options and in old pickles, and their sizes. No torch is needed.

`weights/torch_dtypes.py` has the torch dtypes under the same names.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dtype:
    """One number format.

    Attributes:
        name: in torch, and in a model's config.json.
        header: in the header of a safetensors file.
        size: bytes of one number.
        storage: the class that holds such numbers in torch's pickles; "" for formats that are younger than these classes.
        flag: in options and manifests; "" for what weights are not.
    """

    name: str
    header: str
    size: int
    storage: str = ""
    flag: str = ""


DTYPES = (
    Dtype("float32", "F32", 4, "FloatStorage", "fp32"),
    Dtype("bfloat16", "BF16", 2, "BFloat16Storage", "bf16"),
    Dtype("float16", "F16", 2, "HalfStorage", "fp16"),
    Dtype("float64", "F64", 8, "DoubleStorage", "fp64"),
    Dtype("float8_e4m3fn", "F8_E4M3", 1),
    Dtype("float8_e5m2", "F8_E5M2", 1),
    Dtype("int64", "I64", 8, "LongStorage"),
    Dtype("int32", "I32", 4, "IntStorage"),
    Dtype("int16", "I16", 2, "ShortStorage"),
    Dtype("int8", "I8", 1, "CharStorage"),
    Dtype("uint8", "U8", 1, "ByteStorage"),
    Dtype("bool", "BOOL", 1, "BoolStorage"),
)
TRAINED = ("fp32", "bf16", "fp16")  # flags of what a model is trained in
ITEM_SIZE = {item.header: item.size for item in DTYPES}  # bytes of a number by the name in a header
WEIGHTS = tuple(item.header for item in DTYPES if item.flag)  # what weights may be stored in
FLAG_OF = {item.header: item.flag for item in DTYPES if item.flag}
BYTES = {item.flag: item.size for item in DTYPES if item.flag}  # bytes of a weight by its flag
HEADER_OF_STORAGE = {item.storage: item.header for item in DTYPES if item.storage}
NAMES = frozenset(item.name for item in DTYPES)
