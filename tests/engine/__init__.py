# SPDX-License-Identifier: Apache-2.0
"""Whole engines: vLLM with the plugin, judged by the oracle and by stock vLLM."""
