# SPDX-License-Identifier: Apache-2.0
"""An independent simulation of KV-block eviction over a Hugging Face model.

See README.md beside this file for its rule of independence.
"""

from tests.oracle.generation import Eviction, OracleResult, generate
from tests.oracle.options import Options

__all__ = ["Eviction", "Options", "OracleResult", "generate"]
