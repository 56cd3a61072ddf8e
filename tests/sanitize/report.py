"""What compute-sanitizer printed, as numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from tests.sanitize.driver import DONE

ROOT = Path(__file__).resolve().parents[2]
_PREFIX = "========="
_SUMMARY = re.compile(
    r"^========= (?:ERROR SUMMARY: (?P<errors>\d+) errors?"
    r"|RACECHECK SUMMARY: (?P<hazards>\d+) hazards? displayed)"
)
# "     at name(arguments)+0x90 in file:45", or in racecheck's report on one line.
_PLACE = re.compile(r"(?:^|\s)at (?P<kernel>.+?)(?:\+0x[0-9a-fA-F]+|$)")


def triton_kernels() -> tuple[str, ...]:
    """Names of the Triton kernels under ``kernels/``, as they stand in a report."""
    found = (
        name
        for path in sorted((ROOT / "kernels").rglob("*.py"))
        for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), flags=re.MULTILINE)
    )
    return tuple(dict.fromkeys(found))


# Every CUDA kernel lies in this namespace, mangled or not.
NAMESPACE = "latent_rl"


@dataclass(frozen=True)
class Finding:
    """One report: what is wrong, and in which kernel ("" where the tool names none)."""

    what: str
    kernel: str

    @property
    def ours(self) -> bool:
        """What no kernel is named for counts as ours."""
        return (
            not self.kernel
            or NAMESPACE in self.kernel
            or self.kernel.split("(")[0] in triton_kernels()
        )


@dataclass(frozen=True)
class Verdict:
    """What one tool said about one op.

    Attributes:
        findings: what it printed.
        total: what it counted; None when there is no summary.
        finished: whether the driver said that all calls were made.
        problem: why there is no verdict, or "".
    """

    findings: tuple[Finding, ...] = ()
    total: int | None = None
    finished: bool = False
    problem: str = ""
    seconds: float = field(default=0.0, compare=False)

    @property
    def ours(self) -> int:
        """Findings in our kernels; what the tool counted beyond what it printed is among them."""
        printed = sum(finding.ours for finding in self.findings)
        return printed + max(0, (self.total or 0) - len(self.findings))

    @property
    def elsewhere(self) -> int:
        """Findings in kernels of torch and its libraries."""
        return sum(not finding.ours for finding in self.findings)

    @property
    def clean(self) -> bool:
        return not self.problem and self.ours == 0

    def __str__(self) -> str:
        if self.problem:
            return self.problem
        beside = f" (+{self.elsewhere} elsewhere)" if self.elsewhere else ""
        return f"{self.ours}{beside}"


def parse(output: str) -> Verdict:
    """A verdict of a tool's output together with the driver's."""
    findings: list[Finding] = []
    total, what = None, ""
    for line in output.splitlines():
        if not line.startswith(_PREFIX):
            continue
        if summary := _SUMMARY.match(line):
            total = int(summary["errors"] or summary["hazards"] or 0)
            what = ""
            continue
        text = line.removeprefix(_PREFIX)
        if text.startswith("     "):
            place = _PLACE.search(text)
            if what and place:
                findings.append(Finding(what, place["kernel"].strip()))
                what = ""
            continue
        # A report whose kernel was never named.
        if what:
            findings.append(Finding(what, ""))
        what = _headline(text.strip())
        if what and (place := _PLACE.search(what)):
            findings.append(Finding(what, place["kernel"].strip()))
            what = ""
    if what:
        findings.append(Finding(what, ""))
    finished = DONE in output
    problem = "" if total is not None else "no summary"
    return Verdict(tuple(findings), total, finished, problem or ("" if finished else "unfinished"))


def _headline(text: str) -> str:
    """The first line of a report, or "" for lines that report nothing."""
    known = (
        r"Invalid|Misaligned|Uninitialized|Barrier error|Race reported|hazard detected|Program hit"
    )
    return text if re.search(known, text) else ""
