#!/bin/bash
# a is dropped by the plan and not emitted
set -euo pipefail
cd "$(dirname "$0")"
begin() {  # seconds since 1970
  local left=$(($1 - $(date +%s)))
  echo "--begin=now+$((left > 0 ? left : 0))"
}
