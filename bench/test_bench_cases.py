"""Every case: checked against the reference, then raced against its competitors."""

from __future__ import annotations

from fiun_fast.bench.measure import on_threads


def test_case(name, bench, benchmark):
    """The race is interleaved and goes into our table; pytest-benchmark then times our fastest way, for histories."""
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
    with on_threads(case.threads):
        benchmark.pedantic(work, setup=cold, rounds=5)
