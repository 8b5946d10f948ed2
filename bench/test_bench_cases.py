"""Every case: checked against the reference, raced against its competitors; our fastest way also by pytest-benchmark."""

from __future__ import annotations


def test_case(name, bench, benchmark):
    """The race is interleaved and in the table; pytest-benchmark's own rounds follow, for its histories and compares."""
    case, rows = bench.measure(name)
    row = bench.record.ours(name)
    variant = next(v for v in case.variants if v.name == row.variant.removesuffix(" (graph)"))

    def cold() -> None:
        variant.restore()
        bench.machine.cool()
        bench.machine.wait()

    def work() -> None:
        variant.run()
        bench.machine.wait()

    benchmark.group = f"{bench.mode} on {bench.device}"
    benchmark.extra_info.update({r.variant: r.ms for r in rows})
    benchmark.pedantic(work, setup=cold, rounds=5)
