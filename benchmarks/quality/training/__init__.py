# SPDX-License-Identifier: Apache-2.0
"""Adapters for small models, so that they solve what eviction is to be judged by."""
