#!/usr/bin/env python3
"""Puts the tables made from bench/results/*.json into the documents.

Between `<!-- bench:cpu -->` and `<!-- /bench:cpu -->` in README.md: the main rows of cpu-*.json. Between the
markers `bench:cpu-all` in docs/kernels/cpu.md: all of them. Likewise `bench:gpu` in README.md from
prefill-*.json and decode-*.json, and `bench:gpu-prefill-sm90`, `bench:gpu-prefill`, `bench:gpu-decode` in
docs/kernels/, and `bench:gpu-backward-sm90`, `bench:gpu-backward` and `bench:gpu-training` there from backward-*.json
and training-*.json of GPUs. With --check nothing is written; the exit status is 1 where a document differs from what the records say.
"""

import argparse
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def table(head, rows):
    """The first column is text, the others are numbers."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def number(x, digits=3):
    """Three significant digits, never as 1.2e+03; a dash for what was not measured."""
    if x is None:
        return "–"
    if x >= 10 ** (digits - 1):
        return f"{x:.0f}"
    return f"{float(f'{x:.{digits}g}'):g}"


def percent(x):
    return "–" if x is None else f"{100 * x:.0f} %"


def times(x):
    return "–" if x is None else f"{x:.2f}×"


def ratio(row, name):
    """Median, and the middle half of the rounds where it is recorded."""
    quartiles = row.get(f"{name}_quartiles")
    if name == "speedup":
        text, ends = times(row[name]), [f"{x:.2f}" for x in quartiles or ()]
    else:
        text, ends = percent(row[name]), [f"{100 * x:.0f}" for x in quartiles or ()]
    return f"{text} ({'–'.join(ends)})" if ends else text


def error(x):
    return "–" if x is None else f"{x:.1e}".replace("e-0", "e-")


def threads_of(record):
    return sorted({row["threads"] for row in record["rows"]})


def best_backend(record):
    return record["rows"][0]["backend"]


def shape(row):
    if row["op"] == "decode":
        tokens = "" if row["lens"][0] == 1 else f" of {row['lens'][0]} tokens"
        text = f"N {row['N']}{tokens}, H {row['HV']}"
    elif row["N"] == 1:
        text = f"T {row['lens'][0]}, H {row['HV']}"
    elif len(set(row["lens"])) == 1:
        text = f"{row['N']} × {row['lens'][0]}, H {row['HV']}"
    else:
        text = f"{row['N']} ragged, {sum(row['lens'])} tokens, H {row['HV']}"
    if row["HV"] != row["H"]:
        text += f" of {row['H']} q/k heads"
    return text


def dtype(row):
    return "fp32" if row["dtype"] == "f32" else row["dtype"]


def machine(record):
    """What the numbers were taken on, and how."""
    commit, _, dirty = record["commit"].partition("-")
    rates = []
    for n in map(str, threads_of(record)):
        rate = record["sgemm_gflops"].get(n)
        memory = record["memory_gbps"].get(n)
        rates.append(
            f"{n} thread{'s' if n != '1' else ''}: sgemm {number(rate)} GFLOP/s,"
            f" memory {number(memory)} GB/s read and written"
        )
    lines = [
        f"{record['device']} ({record['machine']}, {record['cpus']} CPUs),"
        f" commit {commit[:12]}{'-' + dirty if dirty else ''}, {record['date'][:10]}.",
        f"OpenBLAS ({record['blas']['core']} kernels) and memory on the same cores in the same run:",
        f"{'; '.join(rates)}.",
    ]
    if record["peers"]:
        versions = ", ".join(f"{name} {version}" for name, version in record["peers"].items())
        lines.append(
            f"Peers: {versions}; the PyTorch functions of `kimi_linear`, gates activated beforehand."
        )
    if record["note"]:
        lines.append(record["note"])
    return lines


def peers(row):
    found = row["peers_ms"]
    return [number(found.get(f"transformers_{name}")) for name in ("chunk", "recurrent")]


def select(record, op, **wanted):
    threads = max(threads_of(record))
    return [
        row
        for row in record["rows"]
        if row["op"] == op
        and row["threads"] == threads
        and all(row[key] == value for key, value in wanted.items())
    ]


def by_shape(rows):
    """Longest first within one number of heads; a stable order for the reader."""
    strength = ["weak", "medium", "strong"]
    return sorted(
        rows, key=lambda row: (-row["HV"], -sum(row["lens"]), row["variant"], strength.index(row["gate"]))
    )


def prefill_line(row, record, full):
    n = row["threads"]
    one = [
        x["ms"]
        for x in record["rows"]
        if x["threads"] == 1
        and all(x[y] == row[y] for y in ("name", "gate", "variant", "backend"))
    ]
    line = [f"{shape(row)}, {row['gate']} gates, {dtype(row)}"]
    if full:
        line.append(row["backend"])
        line.append(number(one[0]) if one and n > 1 else "–")
    line += [number(row["ms"]), number(row["gflops"])]
    line += [ratio(row, "sgemm_ratio"), ratio(row, "speedup")]
    if full:
        line += [error(row["error_o"]), error(row["error_state"])]
    return line + peers(row)


def prefill_table(rows, record, full):
    n = max(threads_of(record))
    head = [f"prefill, D {rows[0]['K']}"]
    head += ["backend", "ms, 1 thread", f"ms, {n} threads"] if full else [f"ms, {n} threads"]
    head += ["GFLOP/s", "of sgemm", f"1 → {n} threads"]
    head += ["error o", "error state"] if full else []
    head += ["transformers chunk, ms", "its token loop, ms"]
    return table(head, [prefill_line(row, record, full) for row in rows])


def decode_table(rows, record, full):
    n = max(threads_of(record))
    head = [f"decode, D {rows[0]['K']}"]
    head += [f"ms, {n} threads", "GB/s of state", "of memory rate"]
    head += [f"1 → {n} threads"] if full else []
    head += ["error o", "error state"] if full else []
    head += ["transformers token loop, ms"]
    lines = []
    for row in rows:
        state = "bf16" if row["state_dtype"] == "bf16" else "fp32"
        state += " [K,V]" if row["variant"] == "kv" else ""
        line = [f"{shape(row)}, {state} state", number(row["ms"]), number(row["state_gbps"])]
        line.append(ratio(row, "memory_ratio"))
        line += [ratio(row, "speedup")] if full else []
        line += [error(row["error_o"]), error(row["error_state"])] if full else []
        lines.append(line + peers(row)[1:])
    return table(head, lines)


def readme(record):
    best = best_backend(record)
    rows = [
        row
        for row in by_shape(select(record, "prefill", backend=best))
        if row["variant"] == "" and row["gate"] != "medium" and len(row["lens"]) == 1
    ]
    decode = [x for x in select(record, "decode", backend=best) if x["variant"] == "" and x["N"] >= 64]
    lines = machine(record) + [""] + prefill_table(rows, record, full=False)
    return lines + [""] + decode_table(decode, record, full=False)


def everything(record):
    rows = by_shape(select(record, "prefill"))
    decode = select(record, "decode")
    lines = [f"`{best_backend(record)}`: " + machine(record)[0], *machine(record)[1:], ""]
    return lines + prefill_table(rows, record, full=True) + [""] + decode_table(decode, record, full=True)


def gpu_machine(record):
    clock = record["clocks_mhz"].get("sm")
    return [
        f"{record['device']}, driver {record['driver']}, SM clock {clock} MHz, copy rate "
        f"{record['copy_gbps']:.0f} GB/s; commit {record['commit'][:12]}, {record['date'][:10]}; "
        f"FLA is fla-core {record['versions'].get('fla-core')} in the same run."
    ]


def same_call(row):
    return row["name"], row["variant"], row["gate"]


def gpu_prefill(record, gates, backend=None):
    """The rows of one backend, or of each call's first, beside those of `portable`."""
    portable = {same_call(row): row for row in record["rows"] if row["backend"] == "portable"}
    first = {}
    for row in record["rows"]:
        if row["gate"] in gates and backend in (None, row["backend"]):
            first.setdefault(same_call(row), row)
    if not first:
        return [f"No result of `{backend}` is recorded yet."]
    beside = any(row["backend"] != "portable" for row in first.values())
    two_calls = any("two_calls_ms" in row for row in first.values())
    lines = []
    for key, row in first.items():
        fla, ms, other = row["peers_ms"].get("fla"), row["ms"], portable.get(key, {})
        peer = row.get("peers_error", {}).get("fla", {})
        line = [row["name"].replace("_", ", "), row["gate"], number(ms), number(row["floor_ms"])]
        line += [times(ms / row["floor_ms"]), number(other.get("ms"))] if beside else []
        line += [number(fla), times(fla / ms if fla else None)]
        line += [error(row["error_o"]), error(row["error_state"])]
        line += [error(other.get("error_o"))] if beside else []
        line += [error(peer.get("o"))]
        lines.append(line + ([number(row.get("two_calls_ms"))] if two_calls else []))
    head = ["prefill, D 128", "gates", "ms", "floor, ms"]
    head += ["over floor", "portable, ms"] if beside else []
    head += ["FLA, ms", "faster", "error o", "state"]
    head += ["portable's o"] if beside else []
    head += ["FLA's o"] + (["prefill and decode apart, ms"] if two_calls else [])
    return table(head, lines)


def gpu_decode(record, short=False):
    """short: some sizes and variants only."""
    lines, between = [], any("between_ms" in row for row in record["rows"])
    for row in record["rows"]:
        common = row["variant"] in ("", "bf16state", "spec8", "spec8_out")
        if short and (not common or row["N"] in (2, 4, 16, 64, 1024)):
            continue
        fla = row["peers_ms"].get("fla")
        name = f"{row['name'].removeprefix('decode_').replace('_', ', ')} {row['variant']}".strip()
        line = [name, number(1e3 * row["ms"]), number(1e3 * row["floor_ms"]), number(1e3 * row["copy_ms"])]
        line += [percent(row["floor_ms"] / row["ms"]), number(1e3 * fla if fla else None)]
        lines.append(line + ([number(1e3 * row["between_ms"])] if between else []))
    head = ["decode, D 128", "µs", "floor, µs", "copy of equal bytes, µs", "of the copy rate", "FLA, µs"]
    return table(head + (["between other kernels, µs"] if between else []), lines)


def gpu_readme(records):
    prefill, decode = records
    lines = gpu_machine(prefill) + [""] + gpu_prefill(prefill, ["strong"])
    return lines + [""] + gpu_decode(decode, short=True)


def gpu_prefill_page(backend):
    def page(records):
        rows = gpu_prefill(records[0], ["weak", "medium", "strong"], backend)
        return gpu_machine(records[0]) + [""] + rows

    return page


def gpu_decode_page(records):
    return gpu_machine(records[1]) + [""] + gpu_decode(records[1])


def gib(x):
    return "–" if x is None else f"{x:.2f}"


def gpu_backward(record, backend):
    """Training steps of one row beside FLA's, then the error of every gradient, the worst of the record's shapes."""
    rows = [row for row in record["rows"] if row["backend"] == backend]
    portable = {
        (row["name"], row["gate"]): row["backward_ms"]
        for row in record["rows"]
        if row["backend"] == "portable" != backend
    }
    lines = []
    for row in rows:
        fla, peak = row["peers_ms"].get("fla"), row.get("peers_peak_gib", {}).get("fla")
        line = [row["name"].replace("_", ", "), row["gate"], number(row["ms"])]
        line += [number(row["forward_ms"]), number(row["backward_ms"])]
        line += [number(portable.get((row["name"], row["gate"])))] if portable else []
        line += [number(row["floor_ms"])]
        line += [number(fla), number(row.get("peers_backward_ms", {}).get("fla"))]
        line += [times(fla / row["ms"] if fla else None), gib(row["peak_gib"]), gib(peak)]
        lines.append(line + [percent(row["peak_gib"] / peak if peak else None)])
    head = ["forward + backward, D 128", "gates", "ms", "forward", "backward"]
    head += (["portable's"] if portable else []) + ["floor, ms", "FLA, ms"]
    head += ["its backward", "faster", "peak GiB", "FLA's", "of FLA's"]
    yield from table(head, lines)
    yield ""
    gates = list(dict.fromkeys(row["gate"] for row in rows))
    known = [row for row in rows if "errors" in row]  # a run that was cut short has none
    compared = [row for row in known if "peers_errors" in row]
    lines = []
    for name in known[0]["errors"] if known else ():
        line = [f"`{name}`"]
        for gate in gates:
            ours = (x["errors"][name] for x in known if x["gate"] == gate)
            line.append(error(max(ours, default=None)))
            beside = [x for x in compared if x["gate"] == gate]
            line.append(error(max((x["errors"][name] for x in beside), default=None)))
            theirs = (x["peers_errors"]["fla"][name] for x in beside)
            line.append(error(max(theirs, default=None)))
        lines.append(line)
    head = ["error of"]
    for gate in gates:
        head += [f"{gate} gates, all shapes", "those that FLA ran", "FLA's"]
    yield from table(head, lines)


def gpu_backward_page(backend):
    def page(records):
        pages = []
        for record in records:
            if all(row["backend"] != backend for row in record["rows"]):
                continue
            first = record.get("first_step_ms")
            lines = gpu_machine(record)
            forward = {row["forward_backend"] for row in record["rows"] if row["backend"] == backend}
            lines.append("The forward is that of " + ", ".join(f"`{x}`" for x in sorted(forward)) + ".")
            if first:
                lines.append(
                    f"The first training step of a process, T 8192 and H 32, from `import flash_kda`: {number(first)} ms."
                )
            pages += lines + ["", *gpu_backward(record, backend)]
        return pages or [f"No result of `{backend}` is recorded yet."]

    return page


NAMES = {
    "flash_kda": "this library",
    "naive": "the recurrence in PyTorch",
    "naive64": "the same in float64",
    "fla": "FLA",
}


def gpu_training_page(records):
    """What examples/train.py --compare has recorded."""
    pages = [] if records else ["No result is recorded yet."]
    for record in records:
        s, d, long = record["settings"], record["distance"], record["long"]
        pages += [
            f"{record['device']}, torch {record['torch']}, commit {record['commit']}, {record['date'][:10]}: {s['layers']}"
            f" layers, width {s['dim']}, {s['heads']} heads of {s['head_dim']}, {s['batch']} × {s['length']} bytes a step,"
            f" {s['steps']} steps; long: {long['batch']} × {long['length']} bytes.",
            "",
        ]
        lines = []
        for name, losses in record["losses"].items():
            last, n = number(losses[-1], 4), len(losses)
            last += f" after {n} steps" if n < s["steps"] else ""
            line = [NAMES[name], last, number(record["tokens_per_second"][name])]
            line.append(number(long["tokens_per_second"].get(name)))
            lines.append([*line, number(record["first_step_seconds"][name])])
        head = ["layer", "last loss", "tokens/s", "tokens/s, long", "first step, s"]
        pages += [*table(head, lines), ""]
        apart = {
            "flash_kda_naive": "ours and the recurrence's",
            "naive_naive64": "the recurrence's in float32 and in float64",
            "flash_kda_fla": "ours and FLA's",
        }
        text = [f"{words} are {number(d[pair])} apart" for pair, words in apart.items() if pair in d]
        pages.append(
            f"Loss curves averaged over 10 steps, at most: {'; '.join(text)}. Stopped half way and resumed, the losses differ"
            f" by at most {number(d['resumed']) if d['resumed'] else '0'}."
        )
    return pages


def gpu_records(root):
    """Pairs (prefill, decode) of one device each."""
    pairs = []
    for path in sorted((root / "bench/results").glob("prefill-*.json")):
        other = path.with_name(path.name.replace("prefill-", "decode-"))
        if other.exists():
            pairs.append([json.loads(p.read_text(encoding="utf-8")) for p in (path, other)])
    return pairs


def replaced(text, name, blocks, where):
    begin, end = f"<!-- bench:{name} -->\n", f"<!-- /bench:{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        sys.exit(f"{where}: expected {begin.strip()} and {end} once each")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    return before + begin + "\n\n".join("\n".join(lines) for lines in blocks) + "\n" + end + after


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    parser.add_argument("--root", type=pathlib.Path, default=ROOT, help="of the tree to work on")
    options = parser.parse_args()

    paths = sorted((options.root / "bench/results").glob("cpu-*.json"))
    if not paths:
        sys.exit("no bench/results/cpu-*.json: `make bench` records one")
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    stale = []
    gpu = gpu_records(options.root)
    gradients, training = (
        [
            json.loads(path.read_text(encoding="utf-8"))
            for path in sorted((options.root / "bench/results").glob(f"{kind}-*.json"))
            if not path.stem.startswith(f"{kind}-cpu")
        ]
        for kind in ("backward", "training")
    )
    documents = (
        ("README.md", "cpu", readme, records),
        ("docs/kernels/cpu.md", "cpu-all", everything, records),
        ("README.md", "gpu", gpu_readme, gpu),
        ("docs/kernels/prefill_sm90.md", "gpu-prefill-sm90", gpu_prefill_page("sm90"), gpu),
        ("docs/kernels/prefill_portable.md", "gpu-prefill", gpu_prefill_page("portable"), gpu),
        ("docs/kernels/decode.md", "gpu-decode", gpu_decode_page, gpu),
        ("docs/kernels/backward_sm90.md", "gpu-backward-sm90", gpu_backward_page("sm90"), [gradients]),
        ("docs/kernels/backward_portable.md", "gpu-backward", gpu_backward_page("portable"), [gradients]),
        ("docs/kernels/backward_portable.md", "gpu-training", gpu_training_page, [training]),
    )
    for name, marker, make, sources in documents:
        path = options.root / name
        old = path.read_text(encoding="utf-8")
        new = replaced(old, marker, [make(source) for source in sources], name)
        if new == old:
            continue
        stale.append(name)
        if not options.check:
            path.write_text(new, encoding="utf-8")
    if options.check and stale:
        print(f"{', '.join(stale)}: tables differ from bench/results; run bench/table.py")
        return 1
    print("tables: up to date" if not stale else f"wrote {', '.join(stale)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
