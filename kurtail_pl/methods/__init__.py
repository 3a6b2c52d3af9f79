"""Methods: values that a recipe is made of. Each file holds one, and nothing else names it.

A new one is a frozen dataclass in a file of its own, under the seam that it belongs to, imported here.
"""

from kurtail_pl.methods.cache import CacheFormat
from kurtail_pl.methods.caches.int4_per_token_head import Int4PerTokenHead
from kurtail_pl.methods.caches.nuq_cache import NUQCache
from kurtail_pl.methods.caches.per_token_head import PerTokenHead, Sinks
from kurtail_pl.methods.caches.q4_0_cache import Q4_0Cache
from kurtail_pl.methods.defaults import default_cache, default_format, default_rounder
from kurtail_pl.methods.format import Format
from kurtail_pl.methods.formats.fp4 import MXFP4, NVFP4
from kurtail_pl.methods.formats.mixed import Mixed
from kurtail_pl.methods.formats.mx_plus import MXFP4Plus
from kurtail_pl.methods.formats.normal import Normal
from kurtail_pl.methods.formats.nvint4 import NVINT4
from kurtail_pl.methods.formats.progressive import Progressive
from kurtail_pl.methods.formats.skim import Skim
from kurtail_pl.methods.formats.uniform import Uniform
from kurtail_pl.methods.rounder import Moments, Needs, Rounder
from kurtail_pl.methods.rounders.gptq import GPTQ
from kurtail_pl.methods.rounders.hqq import HQQ, FloatZero
from kurtail_pl.methods.rounders.rtn import RTN
from kurtail_pl.methods.side import Side
from kurtail_pl.methods.sides.low_rank import LowRank
from kurtail_pl.methods.sides.sparse import Sparse
from kurtail_pl.methods.tuner import BitTuner, ClipTuner, TransformTuner, Tuner, WeightTuner
from kurtail_pl.methods.tuners.block_transforms import BlockTransforms
from kurtail_pl.methods.tuners.learned_clips import LearnedClips
from kurtail_pl.methods.tuners.matching import Matching
from kurtail_pl.methods.tuners.searched_clips import SearchedClips
from kurtail_pl.methods.tuners.sensitive_bits import SensitiveBits

__all__ = [
    "GPTQ",
    "HQQ",
    "MXFP4",
    "NVFP4",
    "NVINT4",
    "RTN",
    "BitTuner",
    "BlockTransforms",
    "CacheFormat",
    "ClipTuner",
    "FloatZero",
    "Format",
    "Int4PerTokenHead",
    "LearnedClips",
    "LowRank",
    "MXFP4Plus",
    "Matching",
    "Mixed",
    "Moments",
    "NUQCache",
    "Needs",
    "Normal",
    "PerTokenHead",
    "Progressive",
    "Q4_0Cache",
    "Rounder",
    "SearchedClips",
    "SensitiveBits",
    "Side",
    "Sinks",
    "Skim",
    "Sparse",
    "TransformTuner",
    "Tuner",
    "Uniform",
    "WeightTuner",
    "default_cache",
    "default_format",
    "default_rounder",
]
