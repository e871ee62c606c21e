"""Adam with the setting of apex and DeepSpeed that torch has none of."""

from __future__ import annotations

import math
from typing import Any

from bigmodel import _check, optim


class BiasCorrected(optim.Adam):
    """bigmodel.optim.Adam with `bias_correction` in its groups: False counts steps from infinity."""

    def _set_bias_correction(self, bias_correction: bool) -> None:
        """After the constructor of Adam."""
        _check.flag(self._name(), "bias_correction", bias_correction)
        self.defaults["bias_correction"] = bias_correction
        for group in self.param_groups:
            group.setdefault("bias_correction", bias_correction)

    def _first_step(self, group: dict[str, Any]) -> float:
        return 0.0 if group["bias_correction"] else math.inf
