"""Times each operation of Xception at the sizes that matter: our lowering, XLA's own, and a copy of the input.

All three take turns in one process. Value and gradients (of input and kernel) are timed separately. The copy reads and
writes as many bytes as the input has; operations that wait for memory can be compared with it.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks import command

EXAMPLES = """\
  python -m benchmarks.ops
  python -m benchmarks.ops --batch 1 --only depthwise --json ops.json"""

# (operation, [H, W, C] of its input, shape of its kernel or None, options): at 299 px.
CASES = [
    ("convolution", (149, 149, 32), (3, 3, 32, 64), dict(padding="VALID")),  # block1_conv2
    ("depthwise", (147, 147, 128), (3, 3, 1, 128), {}),  # block2_sepconv2
    ("depthwise", (74, 74, 256), (3, 3, 1, 256), {}),  # block3_sepconv2
    ("depthwise", (19, 19, 728), (3, 3, 1, 728), {}),  # 24 in the middle flow
    ("pointwise", (147, 147, 128), (1, 1, 128, 128), {}),
    ("pointwise", (19, 19, 728), (1, 1, 728, 728), {}),
    ("max_pool", (147, 147, 128), None, {}),  # block2
    ("max_pool", (37, 37, 728), None, {}),  # block4
]


def main(argv: list[str]) -> int:
    arguments = command.parser("ops", __doc__, EXAMPLES)
    arguments.add_argument("--batch", type=command.positive(int), default=8, metavar="N", help="images (8)")
    arguments.add_argument("--rounds", type=command.positive(int), default=9, metavar="N", help="turns of each (9)")
    arguments.add_argument("--only", choices=sorted({name for name, *_ in CASES}), help="this operation (all)")
    options = arguments.parse_args(argv)
    command.check(arguments, options)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])  # before JAX counts them
    progress = command.Progress("ops")
    rows = []
    cases = [case for case in CASES if options.only in (None, case[0])]
    for i, case in enumerate(cases, start=1):
        progress.show(f"{case[0]} {case[1]}, {i} of {len(cases)}")
        rows.append(measure(*case, batch=options.batch, rounds=options.rounds))
    progress.end()
    print(f"\n{table(rows, options)}\n")
    command.write_json(options.json, options, {"rows": rows})
    return 0


def measure(
    name: str, image: Sequence[int], kernel: Sequence[int] | None, keywords: dict[str, Any], *, batch: int, rounds: int
) -> dict[str, Any]:
    """Returns the medians in milliseconds, `{ours, stock} x {value, gradient}` and `copy`."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from xception_flax.host import allocator
    from xception_flax.models import ops

    allocator.keep_freed_memory()  # as the commands do
    functions = {
        "convolution": ops.convolution,
        "depthwise": ops.depthwise_convolution,
        "pointwise": ops.pointwise_convolution,
        "max_pool": ops.max_pool,
    }
    function = partial(functions[name], **keywords)
    rng = np.random.default_rng(0)
    operands = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((batch, *image), kernel) if shape]
    y = jax.eval_shape(function, *operands)
    dy = jnp.asarray(rng.normal(size=y.shape), jnp.float32)

    def gradient(dy, *operands):
        return jax.vjp(function, *operands)[1](dy)

    programs: dict[str, Callable[[], Any]] = {}
    for lowering, side in (("platform", "ours"), ("stock", "stock")):
        with ops.lowering(lowering):
            value = jax.jit(lambda *operands: function(*operands)).lower(*operands).compile()
            both = jax.jit(lambda *operands: gradient(*operands)).lower(dy, *operands).compile()
        programs[f"{side} value"] = partial(value, *operands)
        programs[f"{side} gradient"] = partial(both, dy, *operands)
    programs["copy"] = partial(jax.jit(lambda x: x + 1).lower(operands[0]).compile(), operands[0])

    laps = {program: [] for program in programs}
    for number in range(rounds + 1):
        for program, run in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if number:  # the first is a warm-up
                laps[program].append(1e3 * (time.perf_counter() - start))
    return {
        "operation": name,
        "input": [batch, *image],
        "features": y.shape[-1],
        **{f"{program} ms": statistics.median(times) for program, times in laps.items()},
    }


def table(rows: Sequence[dict[str, Any]], options: Any) -> str:
    """Returns the rows of `measure` as a table in Markdown."""
    header = (
        f"{options.batch} images, {options.threads} threads",
        *("copy ms", "value ms", "of copies", "stock / ours"),
        *("gradient ms", "of copies", "stock / ours"),
    )

    def line(row: dict[str, Any]) -> tuple[str, ...]:
        cells = [f"{row['copy ms']:.1f}"]
        for part in ("value", "gradient"):
            ours, stock = row[f"ours {part} ms"], row[f"stock {part} ms"]
            cells += [f"{ours:.1f}", f"{ours / row['copy ms']:.1f}", f"{stock / ours:.1f}"]
        size = " x ".join(map(str, row["input"][1:]))
        return (f"{row['operation']}, {size} -> {row['features']}", *cells)

    return command.markdown(header, [line(row) for row in rows])


if __name__ == "__main__":
    command.run(main)
