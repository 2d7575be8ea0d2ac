"""Concept files in plain NumPy: write, read, and the fingerprint of a base model.

The format is the one that the module documentation of `src/concept/file.rs` defines; the tests compare this file with
the Rust implementation byte for byte. It knows nothing of PyTorch: weights come in as NumPy arrays.

    fingerprint({"down_blocks.0...attn2.to_k": array [out, in], ...}) -> 64 hexadecimal digits
    write(path, {"down_blocks.0...attn2.to_k": (out, in, sorted indices)}, metadata)
    read(path) -> ({path: (out, in, indices)}, metadata)
"""

import hashlib
import json
import os
import struct

import numpy as np

FORMAT_VERSION = "1"
SUFFIX = ".neurons"
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


def write(path, layers, metadata):
    """Writes a concept file, by a temporary file and a rename. `metadata` values are strings; see `file.rs`."""
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
    tensors, data = {}, b""
    for name in sorted(layers, key=lambda name: name.encode()):
        payload = encode(*layers[name])
        offsets = [len(data), len(data) + len(payload)]
        tensors[name + SUFFIX] = {"dtype": "U8", "shape": [len(payload)], "data_offsets": offsets}
        data += payload
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


def read(path):
    """`({path: (out_features, in_features, indices)}, metadata)` of a concept file."""
    with open(path, "rb") as file:
        content = file.read()
    (length,) = struct.unpack_from("<Q", content)
    if length > min(HEADER_LIMIT, len(content) - 8):
        raise ValueError("the header's length is wrong")
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    if metadata.get("macula.format") != FORMAT_VERSION:
        raise ValueError(f"not a concept file of format {FORMAT_VERSION}")
    if metadata.get("macula.values") != "none":
        raise ValueError(f"values {metadata.get('macula.values')!r} are not supported")
    data = content[8 + length :]
    if metadata.get("modelspec.hash_sha256") != "0x" + hashlib.sha256(data).hexdigest():
        raise ValueError("the data does not have the hash that the header says")
    layers = {}
    for name, tensor in header.items():
        begin, end = tensor["data_offsets"]
        layers[name.removesuffix(SUFFIX)] = decode(data[begin:end])
    return layers, metadata
