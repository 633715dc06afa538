# SPDX-License-Identifier: Apache-2.0
"""The engine of a soak, behind `vllm serve`."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.quick_start.nursery import EXECUTED
from tests.serving.server import running_server
from tests.soak.audit import AUDIT_FILE
from tests.soak.clients import ADAPTER
from tests.soak.engines import ROOT, Host
from tests.soak.http_client import HttpClient
from tests.soak.run import Plan, Report, Soak
from tests.soak.setups import MODEL_NAME, as_flags


async def soak_server(host: Host, plan: Plan, say: Callable[[str], None]) -> Report:
    """Soak a server.

    Args:
        host: Where and with what.
        plan: How much there is to do.
        say: Takes lines of progress.
    """
    flags = [*as_flags(host.arguments()), "--served-model-name", MODEL_NAME]
    if host.adapter:
        flags += ["--lora-modules", f"{ADAPTER}={host.find_adapter()}"]
    log = host.folder / "log.txt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(AUDIT_FILE, str(host.audit))
        # for what disturbs it
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        if host.num_ranks > 1:
            # what depends on the order of a set differs between ranks that are executed
            patch.setenv(EXECUTED, "1")
        with running_server(host.find_model(), flags, log) as server:
            client = HttpClient(server.url)
            soak = Soak(
                *(client, plan, host.limits(), host.audit, server.pid, say),
                host.ranks,
            )
            try:
                report = await soak.run()
                if not server.is_healthy():
                    report.fault("the server is not healthy in the end")
                return report
            finally:
                if soak.report.num_faults:
                    say(f"the end of the server's log:\n{log.read_text()[-6000:]}")
                await client.close()
