"""What a recipe means that does not name a method."""

from __future__ import annotations

from kurtail_pl.methods.cache import CacheFormat
from kurtail_pl.methods.caches.per_token_head import PerTokenHead
from kurtail_pl.methods.format import Format
from kurtail_pl.methods.formats.uniform import Uniform
from kurtail_pl.methods.rounder import Rounder
from kurtail_pl.methods.rounders.gptq import GPTQ


def default_format() -> Format:
    """How weights are stored when nobody says otherwise: 4-bit integers, a scale for each output channel."""
    return Uniform()


def default_cache() -> CacheFormat:
    """How keys and values are kept when nobody says otherwise: 4-bit integers, a scale for each token and head."""
    return PerTokenHead()


def default_rounder() -> Rounder:
    """How weights are rounded when nobody says otherwise."""
    return GPTQ()
