"""The checks of `minisd.features.validate` under their former names; use those of that module."""

from minisd.features.validate import DTYPES as PRECISIONS
from minisd.features.validate import check_dtype as precision
from minisd.features.validate import check_finite as finite
from minisd.features.validate import check_finite_input as finite_input
from minisd.features.validate import check_float as real
from minisd.features.validate import check_int as whole
from minisd.features.validate import check_path as path
from minisd.features.validate import check_shape as shaped
from minisd.features.validate import check_strings as texts
from minisd.features.validate import check_tensor as floats
from minisd.features.validate import check_unit_range as about_unit
from minisd.features.validate import check_writable as writable
from minisd.features.validate import free_memory, is_out_of_memory

__all__ = [
    "PRECISIONS",
    "about_unit",
    "finite",
    "finite_input",
    "floats",
    "free_memory",
    "is_out_of_memory",
    "path",
    "precision",
    "real",
    "shaped",
    "texts",
    "whole",
    "writable",
]
