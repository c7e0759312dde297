"""Look up the pinned packages among known vulnerabilities: ``make audit``.

Exit status 0: none are known. 1: some are, and are listed. 2: not all were checked, as the database cannot be reached
or does not have them.
"""

import json
import subprocess
import sys
from pathlib import Path

PINNED = Path(__file__).parents[1] / "constraints.txt"
COMMAND = ("-m", "pip_audit", "--requirement", str(PINNED), "--no-deps", "--disable-pip", "--format=json")


def main() -> int:
    """Run pip-audit, print what it found, and return the exit status."""
    done = subprocess.run([sys.executable, *COMMAND], capture_output=True, text=True)  # noqa: S603 (fixed words)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        print(f"not checked, which is no pass: {reason}", file=sys.stderr)
        return 2
    if not packages:
        print("not checked, which is no pass: no packages", file=sys.stderr)
        return 2
    skipped = [package for package in packages if "skip_reason" in package]
    if skipped:
        print(f"not checked, which is no pass: {len(skipped)} packages; the first: {skipped[0]['skip_reason']}")
    affected = [package for package in packages if package.get("vulns")]
    for package in affected:
        print(f"{package['name']} {package['version']}: {', '.join(known['id'] for known in package['vulns'])}")
    print(f"{len(packages)} packages: {len(affected)} with known vulnerabilities, {len(skipped)} not checked")
    return 1 if affected else 2 if skipped else 0


if __name__ == "__main__":
    sys.exit(main())
