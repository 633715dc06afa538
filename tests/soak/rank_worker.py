# SPDX-License-Identifier: Apache-2.0
"""The worker of each of several ranks on CPUs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.soak.audit import AUDIT_FILE, TABLES
from tests.soak.rank_audit import RankAudit
from tests.soak.rank_steps import rank_file
from tests.soak.worker import PoisoningWorker


class WatchedWorker(PoisoningWorker):
    """Fills what is nobody's, and is looked into."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load it, and look at what the package does with it."""
        super().load_model(*args, **kwargs)
        path = rank_file(Path(os.environ[AUDIT_FILE]), self.rank)
        self._audit = RankAudit(path, lambda: self.model_runner.input_batch.req_ids)
        self._audit.watch()

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run the step, and look at it."""
        tables = getattr(scheduler_output, TABLES, None)
        if tables is None:
            return super().execute_model(scheduler_output)
        with self._audit.step(tables):
            return super().execute_model(scheduler_output)
