"""What bench_builds.py measured, as the documentation's table."""

from reporting import PAGE, machine_and_versions, markdown, put_between, when_and_at


def table(results):
    """A row a case and dtype: each task's time before over its time now."""
    cases = results["cases"]
    tasks = list(dict.fromkeys(task for case in cases for task in case["tasks"]))

    def cell(case, task):
        return f"{case['tasks'][task]['against']['before']:.2f}x" if task in case["tasks"] else ""

    rows = [[c["shape"], c["dtype"], *(cell(c, task) for task in tasks)] for c in cases]
    before = ", ".join(sorted({case["before"] for case in cases}))
    text = markdown(["case", "dtype", *tasks], rows)
    text += [
        "",
        f"{machine_and_versions(results['machine'])}. {when_and_at(cases)} Before: {before}.",
    ]
    return "\n".join(text)


def update(results):
    put_between(PAGE, "builds_cpu", table(results))
