# SPDX-License-Identifier: Apache-2.0
"""Thousands of requests of every kind against one engine that is looked into."""
