"""Concept files in plain NumPy: write, read, and the fingerprint of a base model.

The format is the one that the module documentation of `src/concept/file.rs` defines; the tests compare this file with
the Rust implementation byte for byte. It knows nothing of PyTorch: weights come in as NumPy arrays.

    fingerprint({"down_blocks.0...attn2.to_k": array [out, in], ...}) -> 64 hexadecimal digits
    write(path, {"down_blocks.0...attn2.to_k": (out, in, sorted indices)}, metadata)
    read(path) -> ({path: (out, in, indices)}, metadata)

Where the metadata's `macula.values` is not "none", each layer has a fourth part, the tuned values as float32. Where it has
a `macula.token`, `read_rows(path)` gives the learnt rows of that word, one for each text encoder.
"""

import hashlib
import json
import os
import struct

import numpy as np

FORMAT_VERSION = "1"
SUFFIX = ".neurons"
VALUES_SUFFIX = ".values"
ROW_NAME = "text_encoder.{}.token"
FLOATS = {"float16": ("F16", "<f2"), "float32": ("F32", "<f4")}
CODE_BITS = {"binary": 1, "quaternary": 2}
COMPLEMENT = 0x80
HEADER = struct.Struct("<IIIB")
HEADER_LIMIT = 8 << 20


def fingerprint(weights):
    """SHA-256 of the K and V weights `[out, in]`, rounded to float16, little-endian, in byte-wise order of paths."""
    digest = hashlib.sha256()
    for path in sorted(weights, key=lambda path: path.encode()):
        with np.errstate(over="ignore"):
            digest.update(np.ascontiguousarray(weights[path]).astype("<f2").tobytes())
    return digest.hexdigest()


def _gaps(indices):
    return np.diff(np.asarray(indices, np.int64), prepend=-1) - 1


def _rice_parameter(gaps):
    """The smallest parameter of least cost. The cost is convex in the parameter, so the first rise ends the search."""
    costs = [int(parameter * len(gaps) + (gaps >> parameter).sum()) for parameter in range(32)]
    return int(np.argmin(costs))


def _pack(bits):
    return np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()


def encode(out_features, in_features, indices):
    """The payload of one projection; `indices` count weights of the `[out, in]` layout and ascend strictly."""
    weights = out_features * in_features
    indices = np.asarray(indices, np.int64)
    if len(indices) and not (0 <= indices[0] and indices[-1] < weights and np.all(np.diff(indices) > 0)):
        raise ValueError(f"indices must ascend strictly within 0..{weights}")
    flags = 0
    if 2 * len(indices) > weights:
        flags = COMPLEMENT
        indices = np.setdiff1d(np.arange(weights), indices, assume_unique=True)
    gaps = _gaps(indices)
    parameter = _rice_parameter(gaps) if len(indices) else 0
    low = (gaps[:, None] >> np.arange(parameter)) & 1
    ones = np.cumsum((gaps >> parameter) + 1) - 1
    unary = np.zeros(int(ones[-1]) + 1 if len(ones) else 0, np.uint8)
    unary[ones] = 1
    header = HEADER.pack(out_features, in_features, len(indices), parameter | flags)
    return header + _pack(low.reshape(-1)) + _pack(unary)


def decode(payload):
    """`(out_features, in_features, indices)` of one projection's payload."""
    if len(payload) < HEADER.size:
        raise ValueError("payload shorter than its header")
    out_features, in_features, count, flags = HEADER.unpack_from(payload)
    parameter = flags & ~COMPLEMENT
    low_bytes = (count * parameter + 7) // 8
    if parameter > 31 or len(payload) < HEADER.size + low_bytes:
        raise ValueError("payload header contradicts itself")
    body = np.frombuffer(payload, np.uint8)[HEADER.size :]
    low = np.unpackbits(body[:low_bytes], bitorder="little")[: count * parameter].reshape(count, parameter)
    low = (low.astype(np.int64) << np.arange(parameter)).sum(axis=1)
    ones = np.flatnonzero(np.unpackbits(body[low_bytes:], bitorder="little"))
    if len(ones) != count:
        raise ValueError(f"payload says {count} indices and holds {len(ones)}")
    high = np.diff(ones, prepend=-1) - 1
    indices = np.cumsum((high << parameter) + low + 1) - 1
    if count and indices[-1] >= out_features * in_features:
        raise ValueError("an index lies outside the projection")
    if flags & COMPLEMENT:
        indices = np.setdiff1d(np.arange(out_features * in_features), indices, assume_unique=True)
    return out_features, in_features, indices


def levels(values, count):
    """The `count` levels of least squared error, ascending float32: Lloyd's iteration from the values' quantiles."""
    ordered = np.sort(np.asarray(values, np.float32))
    distinct = np.unique(ordered)
    if len(distinct) <= count:
        last = distinct[-1] if len(distinct) else np.float32(0)
        return np.concatenate([distinct, np.full(count - len(distinct), last, np.float32)])
    found = ordered[(2 * np.arange(count) + 1) * len(ordered) // (2 * count)]
    for _ in range(100):
        wide = found.astype(np.float64)
        ends = np.searchsorted(ordered.astype(np.float64), (wide[:-1] + wide[1:]) / 2, side="right")
        parts = np.split(ordered.astype(np.float64), ends)
        moved = np.array([part.mean() if len(part) else old for part, old in zip(parts, found)], np.float32)
        if np.array_equal(moved, found):
            break
        found = moved
    return found


def _codes(values, among):
    return np.abs(np.asarray(values, np.float64)[:, None] - among.astype(np.float64)).argmin(1)


def rounded(values, precision):
    """Values float32 as a precision holds them: "binary", "quaternary", "float16" or "float32"."""
    values = np.asarray(values, np.float32)
    if precision in CODE_BITS:
        among = levels(values, 1 << CODE_BITS[precision])
        return among[_codes(values, among)]
    return values.astype(FLOATS[precision][1]).astype(np.float32)


def encode_values(values, precision):
    """Dtype, shape and bytes of one projection's values, which must be rounded to the precision."""
    if precision in FLOATS:
        dtype, numpy = FLOATS[precision]
        return dtype, [len(values)], np.asarray(values).astype(numpy).tobytes()
    bits = CODE_BITS[precision]
    among = levels(values, 1 << bits)
    content = among.astype("<f4").tobytes() + _pack((_codes(values, among)[:, None] >> np.arange(bits) & 1).reshape(-1))
    return "U8", [len(content)], content


def decode_values(content, count, precision):
    """The values float32 [count] of `encode_values`."""
    if precision in FLOATS:
        return np.frombuffer(content, FLOATS[precision][1]).astype(np.float32)
    bits = CODE_BITS[precision]
    among, codes = np.frombuffer(content[: 4 << bits], "<f4"), np.frombuffer(content[4 << bits :], np.uint8)
    codes = np.unpackbits(codes, bitorder="little")[: count * bits].reshape(count, bits)
    return among[(codes << np.arange(bits)).sum(axis=1)].astype(np.float32)


def write(path, layers, metadata, rows=()):
    """Writes a concept file, by a temporary file and a rename. `metadata` values are strings; see `file.rs`. `rows` are
    float32 [width], one for each text encoder, if the metadata has a `macula.token`."""
    metadata = dict(metadata)
    metadata.setdefault("macula.format", FORMAT_VERSION)
    metadata.setdefault("macula.values", "none")
    metadata.setdefault("macula.role", "implant")
    metadata.setdefault("macula.scope", "global")
    metadata.setdefault("modelspec.sai_model_spec", "1.0.1")
    metadata.setdefault("modelspec.implementation", "macula")
    missing = [key for key in ("macula.base", "modelspec.title", "modelspec.architecture") if key not in metadata]
    if missing:
        raise ValueError(f"metadata lacks {missing}")
    if bool(len(rows)) != ("macula.token" in metadata):
        raise ValueError("learnt rows need macula.token, and the other way round")
    tensors, data = {}, b""
    ordered = sorted(layers, key=lambda name: name.encode())
    precision = metadata["macula.values"]

    def add(name, dtype, shape, payload):
        nonlocal data
        tensors[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(payload)]}
        data += payload

    for number, row in enumerate(rows):
        add(ROW_NAME.format(number), "F32", [len(row)], np.asarray(row).astype("<f4").tobytes())
    if precision != "none":
        for name in ordered:
            add(name + VALUES_SUFFIX, *encode_values(layers[name][3], precision))
    for name in ordered:
        payload = encode(*layers[name][:3])
        add(name + SUFFIX, "U8", [len(payload)], payload)
    metadata["modelspec.hash_sha256"] = "0x" + hashlib.sha256(data).hexdigest()
    content = {"__metadata__": dict(sorted(metadata.items())), **tensors}
    header = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _parts(path):
    """The bytes of each tensor by name, and the metadata."""
    with open(path, "rb") as file:
        content = file.read()
    (length,) = struct.unpack_from("<Q", content)
    if length > min(HEADER_LIMIT, len(content) - 8):
        raise ValueError("the header's length is wrong")
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    if metadata.get("macula.format") != FORMAT_VERSION:
        raise ValueError(f"not a concept file of format {FORMAT_VERSION}")
    data = content[8 + length :]
    if metadata.get("modelspec.hash_sha256") != "0x" + hashlib.sha256(data).hexdigest():
        raise ValueError("the data does not have the hash that the header says")
    return {name: data[slice(*tensor["data_offsets"])] for name, tensor in header.items()}, metadata


def read(path):
    """`({path: (out_features, in_features, indices)}, metadata)` of a concept file."""
    parts, metadata = _parts(path)
    precision = metadata.get("macula.values")
    if precision not in ("none", *FLOATS, *CODE_BITS):
        raise ValueError(f"values {precision!r} are not known")
    layers = {name.removesuffix(SUFFIX): decode(part) for name, part in parts.items() if name.endswith(SUFFIX)}
    if precision != "none":
        for name, (out_features, in_features, indices) in layers.items():
            values = decode_values(parts[name + VALUES_SUFFIX], len(indices), precision)
            layers[name] = out_features, in_features, indices, values
    return layers, metadata


def read_rows(path):
    """The learnt rows of a concept file, float32 [width] for each text encoder; none without a `macula.token`."""
    parts, metadata = _parts(path)
    rows = []
    while "macula.token" in metadata and (name := ROW_NAME.format(len(rows))) in parts:
        rows.append(np.frombuffer(parts[name], "<f4").astype(np.float32))
    return rows
