"""`pytest --results FILE`: the counts of every test file and each failure, as JSON that is at
most a second old whenever the run is stopped, and a row in the terminal every ten seconds."""

import json
import time
from pathlib import Path

KINDS = ("passed", "failed", "skipped")


class Progress:
    def __init__(self, path):
        self.path = Path(path)
        self.begin = self.printed = time.time()
        self.written = 0.0
        self.files, self.failures = {}, []
        self.write("running")

    def pytest_collectreport(self, report):
        if report.failed:
            self.count(report, "failed")

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:  # of a test's other steps only their faults
            self.count(report, report.outcome)

    def count(self, report, outcome):
        file = report.nodeid.partition("::")[0]
        counts = self.files.setdefault(file, dict.fromkeys(KINDS, 0) | {"seconds": 0.0})
        counts[outcome] += 1
        counts["seconds"] = round(counts["seconds"] + getattr(report, "duration", 0.0), 3)
        if outcome == "failed":
            words = str(report.longrepr).strip().splitlines() or [""]
            error = [w for w in words if w.startswith("E ")] or words[-1:]
            self.failures.append({"test": report.nodeid, "error": " ".join(error)[:500]})
        if time.time() - self.written > 1:
            self.write("running")
        if time.time() - self.printed > 10:
            self.printed = time.time()
            print(f"\n{self.row('so far', self.total())}", flush=True)

    def total(self):
        return {k: sum(counts[k] for counts in self.files.values()) for k in KINDS}

    def row(self, name, counts):
        seconds = counts.get("seconds", time.time() - self.begin)
        numbers = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS)
        return f"| {name} | {numbers} | {seconds:.1f} s |"

    def write(self, verdict):
        self.written = time.time()
        found = {
            "verdict": verdict,
            "seconds": round(self.written - self.begin, 1),
            **self.total(),
            "files": self.files,
            "failures": self.failures,
        }
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(found, indent=1) + "\n")
        new.replace(self.path)  # whole at any moment

    def pytest_sessionfinish(self, exitstatus):
        self.write(f"exit code {int(exitstatus)}")

    def pytest_terminal_summary(self, terminalreporter):
        for name, counts in [*self.files.items(), ("all", self.total())]:
            terminalreporter.write_line(self.row(name, counts))
