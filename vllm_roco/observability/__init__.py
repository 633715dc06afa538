# SPDX-License-Identifier: Apache-2.0
"""What the budget did, to be seen from outside: metrics and a trace.

Whatever goes wrong here after the start is one warning, and serving goes on.
"""
