//! Concept files: those of other writers are read, those of ours are read by others, and no bytes do harm.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use macula::Status;
use macula::concept::{
    Concept, Fingerprint, Indices, Layer, LearntToken, MAX_FILE_BYTES, MAX_HEADER_BYTES, Metadata, NeuronSet,
    Precision, Role, Scope, Selection, Values,
};
use sha2::{Digest, Sha256};

const PATHS: [&str; 2] = ["down.0.attn2.to_k", "down.0.attn2.to_v"];

/// A concept of two projections of 8 x 6 weights.
fn concept() -> Concept {
    let sets = [vec![0, 7, 8, 30, 47], (0..40).collect()];
    let layers = PATHS
        .iter()
        .zip(sets)
        .map(|(path, indices)| Layer::new(*path, 8, 6, Indices::from_sorted(48, indices).unwrap()).unwrap());
    let mut metadata = Metadata::new(Fingerprint::from([7; 32]), "A clock", "stable-diffusion-v1/concept-neurons");
    metadata.role = Role::Erase;
    metadata.scope = Scope::Local;
    metadata.method = "mean saliency".into();
    metadata.trigger = "<s1>".into();
    metadata.class_noun = "clock".into();
    metadata.prompts = vec!["a <s1> clock".into(), "\"quoted\" \u{1F570}".into()];
    metadata.selection = Some(Selection::Budget(0.01));
    metadata.steps = Some(100);
    metadata.seed = Some(u64::MAX);
    metadata.date = "2026-01-02".into();
    metadata.other.insert("modelspec.author".into(), "somebody".into());
    Concept { metadata, neurons: NeuronSet::new(layers.collect()).unwrap(), values: None, token: None }
}

/// The concept with a value for each neuron.
fn tuned(precision: Precision) -> Concept {
    let mut concept = concept();
    let layers = concept.neurons.layers().iter();
    let values = layers.map(|layer| layer.indices().iter().map(|index| (index as f32).sin() / 7.0).collect()).collect();
    concept.values = Some(Values::new(precision, &concept.neurons, values).unwrap());
    concept
}

/// The concept with the embedding of its word, for two text encoders.
fn with_token() -> Concept {
    let rows = vec![vec![0.5, -1e-7, 3.25], vec![f32::MIN_POSITIVE, -2.0]];
    Concept { token: Some(LearntToken::new("<s1>", rows).unwrap()), ..tuned(Precision::F16) }
}

fn python(arguments: &[&std::ffi::OsStr]) -> String {
    let interpreter = std::env::var_os("MACULA_PYTHON").expect(
        "MACULA_PYTHON is not set: run the tests with `cargo xtask test`, or take the value from `cargo xtask setup`",
    );
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/concept_files.py");
    let run = Command::new(interpreter).arg(script).args(arguments).output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    String::from_utf8(run.stdout).unwrap()
}

#[test]
fn a_saved_concept_comes_back_whole_and_replaces_what_was_there() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    std::fs::write(&path, "old").unwrap();
    let concept = concept();
    concept.save(&path).unwrap();
    assert_eq!(Concept::load(&path).unwrap(), concept);
    assert_eq!(std::fs::read(&path).unwrap(), concept.to_bytes().unwrap());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing temporary is left");
    let missing = folder.path().join("no/such/folder/a.safetensors");
    assert_eq!(concept.save(missing).unwrap_err().status(), Status::NotFound);
    assert!(concept.save(folder.path()).is_err());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn python_reads_our_files_and_writes_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let mut plain = concept();
    plain.metadata = Metadata::new(Fingerprint::from([1; 32]), "Plain", "x");
    let full = Indices::empty(48).complement().unwrap();
    plain.neurons = NeuronSet::new(vec![
        Layer::new("full", 6, 8, full).unwrap(),
        Layer::new("empty", 6, 8, Indices::empty(48)).unwrap(),
    ])
    .unwrap();
    let mut written = vec![("a", concept()), ("b", plain)];
    written.push(("with a token", with_token()));
    written.extend(Precision::ALL.map(|precision| (precision.name(), tuned(precision))));
    for (name, concept) in &written {
        concept.save(folder.path().join(name).with_extension("safetensors")).unwrap();
    }
    python(&["rewrite".as_ref(), folder.path().as_ref()]);
    for (name, concept) in &written {
        assert_eq!(Concept::load(folder.path().join(name).with_extension("safetensors")).unwrap(), *concept);
        let read = |extension| std::fs::read(folder.path().join(name).with_extension(extension)).unwrap();
        assert_eq!(read("safetensors"), read("again"), "{name}");
    }
}

#[test]
fn files_that_python_made_are_read() {
    let folder = tempfile::tempdir().unwrap();
    python(&["make".as_ref(), folder.path().as_ref()]);
    let mut seen = 0;
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "json") {
            let concept = Concept::load(path.with_extension("safetensors")).unwrap();
            let listed: BTreeMap<String, Vec<u32>> = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            let read: BTreeMap<String, Vec<u32>> = concept
                .neurons
                .layers()
                .iter()
                .map(|layer| (layer.path().to_string(), layer.indices().iter().collect()))
                .collect();
            assert_eq!(read, listed);
            assert_eq!(concept.metadata.prompts, ["a <s1> dög", "say \"no\""]);
            assert_eq!(concept.metadata.seed, Some(u64::MAX));
            assert_eq!(concept.metadata.selection, Some(Selection::Threshold(0.00012)));
            assert_eq!(concept.metadata.other["modelspec.author"], "somebody");
            assert_eq!(concept.metadata.role, Role::Implant);
            seen += 1;
        }
    }
    assert_eq!(seen, 9);
}

/// The parts of a file, to be put together wrongly.
#[derive(Clone)]
struct Parts {
    metadata: Vec<(String, String)>,
    /// Name and description.
    tensors: Vec<(String, String)>,
    data: Vec<u8>,
    /// Whether the hash in the metadata is made to fit the data.
    right_hash: bool,
}

impl Parts {
    fn good() -> Self {
        let bytes = concept().to_bytes().unwrap();
        let header_bytes = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(&bytes[8..8 + header_bytes]).unwrap();
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_string();
        let metadata = header["__metadata__"].as_object().unwrap().iter().map(|(key, v)| (key.clone(), text(v)));
        let tensors = header.iter().filter(|(key, _)| *key != "__metadata__").map(|(k, v)| (k.clone(), v.to_string()));
        let data = bytes[8 + header_bytes..].to_vec();
        Self { metadata: metadata.collect(), tensors: tensors.collect(), data, right_hash: true }
    }

    fn set(mut self, key: &str, value: &str) -> Self {
        self.metadata.retain(|(k, _)| k != key);
        self.metadata.push((key.into(), value.into()));
        self
    }

    fn without(mut self, key: &str) -> Self {
        self.metadata.retain(|(k, _)| k != key);
        self.right_hash &= key != "modelspec.hash_sha256";
        self
    }

    fn tensor(mut self, number: usize, description: &str) -> Self {
        self.tensors[number].1 = description.into();
        self
    }

    fn named(mut self, number: usize, name: &str) -> Self {
        self.tensors[number].0 = name.into();
        self
    }

    /// Tensors of values before the others: of so many elements, each of so many bytes, all of which are `byte`.
    fn values(self, kind: &str, dtype: &str, counts: [usize; 2], bytes: usize, byte: u8) -> Self {
        let named = |(path, count): (&&str, usize)| (format!("{path}.values"), count);
        let tensors = PATHS.iter().zip(counts).map(named).collect();
        self.before(tensors, dtype, bytes, byte).set("macula.values", kind)
    }

    /// Learnt rows of two numbers before the others, for text encoders of these numbers.
    fn rows(self, encoders: &[&str], byte: u8) -> Self {
        let tensors = encoders.iter().map(|encoder| (format!("text_encoder.{encoder}.token"), 2)).collect();
        self.before(tensors, "F32", 4, byte).set("macula.token", "<s1>")
    }

    /// Tensors before the others, by name and elements, each of so many bytes, all of which are `byte`.
    fn before(mut self, tensors: Vec<(String, usize)>, dtype: &str, bytes: usize, byte: u8) -> Self {
        let moved = bytes * tensors.iter().map(|(_, count)| count).sum::<usize>();
        for (_, description) in &mut self.tensors {
            let mut described: serde_json::Value = serde_json::from_str(description).unwrap();
            for offset in described["data_offsets"].as_array_mut().unwrap() {
                *offset = (offset.as_u64().unwrap() + moved as u64).into();
            }
            *description = described.to_string();
        }
        let mut begin = 0;
        for (at, (name, count)) in tensors.into_iter().enumerate() {
            let end = begin + count * bytes;
            let described = format!(r#"{{"dtype":"{dtype}","shape":[{count}],"data_offsets":[{begin},{end}]}}"#);
            self.tensors.insert(at, (name, described));
            begin = end;
        }
        self.data.splice(0..0, vec![byte; moved]);
        self
    }

    /// One tensor with this payload, under a right description and hash.
    fn payload(payloads: &[&[u8]]) -> Self {
        let mut parts = Self::good();
        parts.tensors.clear();
        parts.data.clear();
        for (number, payload) in payloads.iter().enumerate() {
            let (begin, bytes) = (parts.data.len(), payload.len());
            parts.data.extend_from_slice(payload);
            parts.tensors.push((
                format!("{number}.neurons"),
                format!(r#"{{"dtype":"U8","shape":[{bytes}],"data_offsets":[{begin},{}]}}"#, begin + bytes),
            ));
        }
        parts
    }

    fn header(&self) -> String {
        let mut metadata = self.metadata.clone();
        if self.right_hash {
            let hash = Sha256::digest(&self.data).iter().fold("0x".into(), |text, b| format!("{text}{b:02x}"));
            metadata.retain(|(key, _)| key != "modelspec.hash_sha256");
            metadata.push(("modelspec.hash_sha256".to_string(), hash));
        }
        let quoted = |text: &str| serde_json::Value::from(text).to_string();
        let entries: Vec<String> = metadata.iter().map(|(k, v)| format!("{}:{}", quoted(k), quoted(v))).collect();
        let tensors: String = self.tensors.iter().map(|(k, v)| format!(",{}:{v}", quoted(k))).collect();
        format!(r#"{{"__metadata__":{{{}}}{tensors}}}"#, entries.join(","))
    }

    fn bytes(&self) -> Vec<u8> {
        file(self.header().as_bytes(), &self.data)
    }
}

fn file(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

/// A payload from its fields.
fn payload(out: u32, inputs: u32, count: u32, flags: u8, streams: &[u8]) -> Vec<u8> {
    [&out.to_le_bytes()[..], &inputs.to_le_bytes(), &count.to_le_bytes(), &[flags], streams].concat()
}

fn attacks() -> Vec<(&'static str, Vec<u8>, Status)> {
    use Status::{InvalidFile, LimitExceeded, Unsupported};
    let good = Parts::good;
    let header = || good().header();
    let data = || good().data;
    let with_header = |text: String| file(text.as_bytes(), &data());
    let tensor =
        |begin: i64, end: i64| format!(r#"{{"dtype":"U8","shape":[{}],"data_offsets":[{begin},{end}]}}"#, end - begin);
    let size = data().len() as i64;
    let first = {
        let described: serde_json::Value = serde_json::from_str(&good().tensors[0].1).unwrap();
        described["data_offsets"][1].as_i64().unwrap()
    };
    let one = |payload: Vec<u8>| Parts::payload(&[&payload]).bytes();
    let foreign = |name: &str| {
        let described = r#"{"dtype":"F16","shape":[2],"data_offsets":[0,4]}"#;
        file(format!(r#"{{"{name}":{described}}}"#).as_bytes(), &[0; 4])
    };
    let full_of = |weights: u32| payload(weights >> 12, 1 << 12, 0, 0x80, &[]);
    let mut all = vec![
        ("an empty file", vec![], InvalidFile),
        ("seven bytes", vec![2, 0, 0, 0, 0, 0, 0], InvalidFile),
        ("no header", 0u64.to_le_bytes().to_vec(), InvalidFile),
        ("a header of 2^64 - 1 bytes", [&u64::MAX.to_le_bytes()[..], b"{}"].concat(), InvalidFile),
        ("a header longer than the file", [&100u64.to_le_bytes()[..], b"{}"].concat(), InvalidFile),
        ("a header above the limit", file(&vec![b' '; MAX_HEADER_BYTES as usize + 1], &[]), LimitExceeded),
        ("a header of spaces", file(&[b' '; 64], &[]), InvalidFile),
        ("an array as header", file(b"[]", &[]), InvalidFile),
        ("null as header", file(b"null", &[]), InvalidFile),
        ("a header that is not UTF-8", file(b"{\"\xff\":{}}", &[]), InvalidFile),
        ("a header that breaks off", with_header(header()[..40].into()), InvalidFile),
        ("text after the header's object", with_header(header() + "{}"), InvalidFile),
        ("zeros after the header's object", with_header(header() + "\0\0"), InvalidFile),
        ("10,000 nested arrays", file(format!("{{\"a\":{}", "[".repeat(10_000)).as_bytes(), &[]), InvalidFile),
        (
            "nested arrays in the metadata",
            file(format!("{{\"__metadata__\":{}", "[".repeat(10_000)).as_bytes(), &[]),
            InvalidFile,
        ),
        (
            "a number as metadata",
            with_header(header().replace(r#""macula.format":"1""#, r#""macula.format":1"#)),
            InvalidFile,
        ),
        (
            "null as metadata",
            with_header(header().replace(r#""macula.format":"1""#, r#""macula.format":null"#)),
            InvalidFile,
        ),
        ("metadata twice", with_header(header().replacen('{', r#"{"__metadata__":{},"#, 1)), InvalidFile),
        (
            "a metadata key twice",
            with_header(header().replace(r#""macula.format":"1""#, r#""macula.format":"1","macula.format":"1""#)),
            InvalidFile,
        ),
        ("a tensor twice", good().named(1, &good().tensors[0].0).bytes(), InvalidFile),
        (
            "a field twice",
            good().tensor(0, &tensor(0, first).replace(r#""dtype""#, r#""dtype":"U8","dtype""#)).bytes(),
            InvalidFile,
        ),
        ("a field too many", good().tensor(0, &tensor(0, first).replace('{', r#"{"more":0,"#)).bytes(), InvalidFile),
        ("a field missing", good().tensor(0, r#"{"dtype":"U8","shape":[0]}"#).bytes(), InvalidFile),
        ("a negative offset", good().tensor(0, &tensor(-1, first)).bytes(), InvalidFile),
        ("a fraction as offset", good().tensor(0, &tensor(0, first).replace("[0,", "[0.5,")).bytes(), InvalidFile),
        (
            "an offset above 2^64",
            good().tensor(0, &tensor(0, first).replace("[0,", "[18446744073709551616,")).bytes(),
            InvalidFile,
        ),
        ("one offset", good().tensor(0, r#"{"dtype":"U8","shape":[0],"data_offsets":[0]}"#).bytes(), InvalidFile),
        (
            "three offsets",
            good().tensor(0, r#"{"dtype":"U8","shape":[0],"data_offsets":[0,0,0]}"#).bytes(),
            InvalidFile,
        ),
        (
            "an end before its begin",
            good().tensor(0, r#"{"dtype":"U8","shape":[1],"data_offsets":[3,2]}"#).bytes(),
            InvalidFile,
        ),
        (
            "an end near 2^64",
            good()
                .tensor(0, r#"{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,18446744073709551615]}"#)
                .bytes(),
            InvalidFile,
        ),
        ("tensors that overlap", good().tensor(1, &tensor(first - 1, size)).bytes(), InvalidFile),
        ("tensors of the same bytes", good().tensor(1, &tensor(0, first)).bytes(), InvalidFile),
        ("a gap between tensors", good().tensor(1, &tensor(first + 1, size)).bytes(), InvalidFile),
        ("a gap before the tensors", good().tensor(0, &tensor(1, first)).bytes(), InvalidFile),
        ("data after the tensors", file(header().as_bytes(), &[data(), vec![0]].concat()), InvalidFile),
        ("data that breaks off", file(header().as_bytes(), &data()[1..]), InvalidFile),
        ("no data", file(header().as_bytes(), &[]), InvalidFile),
        (
            "a shape of other bytes",
            good().tensor(0, &tensor(0, first).replace("\"shape\":[", "\"shape\":[1")).bytes(),
            InvalidFile,
        ),
        (
            "a shape of two sides",
            good().tensor(0, &tensor(0, first).replace("\"shape\":[", "\"shape\":[1,")).bytes(),
            InvalidFile,
        ),
        (
            "a shape of no side",
            good().tensor(0, &format!(r#"{{"dtype":"U8","shape":[],"data_offsets":[0,{first}]}}"#)).bytes(),
            InvalidFile,
        ),
        ("a float tensor", good().tensor(0, &tensor(0, first).replace("U8", "F8_E4M3")).bytes(), InvalidFile),
        ("an unknown type", good().tensor(0, &tensor(0, first).replace("U8", "Q3")).bytes(), InvalidFile),
        ("a tensor of another name", good().named(0, "down.0.attn2.to_k.weight").bytes(), InvalidFile),
        ("a tensor without a path", good().named(0, ".neurons").bytes(), InvalidFile),
        ("a LoRA", foreign("lora_unet_down_blocks_0.lora_down.weight"), InvalidFile),
        ("a whole model", foreign("model.diffusion_model.input_blocks.0.0.weight"), InvalidFile),
        ("a file without tensors or metadata", file(b"{}", &[]), InvalidFile),
        ("a pickle in a zip", b"PK\x03\x04\x00\x00\x08\x08\x00\x00\x00\x00archive/data.pkl".to_vec(), InvalidFile),
        ("an ONNX model", b"\x08\x08\x12\x07pytorch\x1a\x062.10.0:\x80\x01".to_vec(), InvalidFile),
        ("a GGUF file", b"GGUF\x03\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00".to_vec(), InvalidFile),
        ("a picture", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".to_vec(), InvalidFile),
        ("an error page", b"<!DOCTYPE html><html><body>404</body></html>".to_vec(), InvalidFile),
        (
            "a Git LFS pointer",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n".to_vec(),
            InvalidFile,
        ),
        ("a newer format", good().set("macula.format", "2").bytes(), Unsupported),
        ("values of another kind", good().set("macula.values", "ternary").bytes(), Unsupported),
        ("values that are not there", good().set("macula.values", "float16").bytes(), InvalidFile),
        ("values that are not said", good().values("none", "F16", [5, 40], 2, 0).bytes(), InvalidFile),
        ("values of another type", good().values("float16", "F32", [5, 40], 4, 0).bytes(), InvalidFile),
        ("too few values", good().values("float16", "F16", [5, 39], 2, 0).bytes(), InvalidFile),
        ("values that are not numbers", good().values("float32", "F32", [5, 40], 4, 0xff).bytes(), InvalidFile),
        ("codes without levels", good().values("quaternary", "U8", [2, 10], 1, 0).bytes(), InvalidFile),
        ("codes of levels that are no numbers", good().values("binary", "U8", [9, 13], 1, 0xff).bytes(), InvalidFile),
        (
            "values of no neurons",
            good().values("float16", "F16", [5, 40], 2, 0).named(0, "up.9.attn2.to_k.values").bytes(),
            InvalidFile,
        ),
        ("a learnt word without rows", good().set("macula.token", "<s1>").bytes(), InvalidFile),
        ("rows of no word", good().rows(&["0"], 0).without("macula.token").bytes(), InvalidFile),
        ("rows of an empty word", good().rows(&["0"], 0).set("macula.token", " ").bytes(), InvalidFile),
        ("rows that are not finite", good().rows(&["0"], 0xff).bytes(), InvalidFile),
        ("rows without the first", good().rows(&["1"], 0).bytes(), InvalidFile),
        ("rows of which one is left out", good().rows(&["0", "2"], 0).bytes(), InvalidFile),
        ("rows of no number", good().rows(&["0", "x"], 0).bytes(), InvalidFile),
        (
            "rows of more encoders than there are",
            good().rows(&["0", "1", "2", "3", "4", "5", "6", "7", "8"], 0).bytes(),
            InvalidFile,
        ),
        (
            "a row of half precision",
            good().before(vec![("text_encoder.0.token".into(), 2)], "F16", 2, 0).set("macula.token", "<s1>").bytes(),
            InvalidFile,
        ),
        (
            "a row that breaks off",
            good().rows(&["0"], 0).tensor(0, r#"{"dtype":"F32","shape":[2],"data_offsets":[0,7]}"#).bytes(),
            InvalidFile,
        ),
        ("a short fingerprint", good().set("macula.base", "00ff").bytes(), InvalidFile),
        ("a fingerprint of other characters", good().set("macula.base", &"z".repeat(64)).bytes(), InvalidFile),
        ("an unknown role", good().set("macula.role", "enhance").bytes(), InvalidFile),
        ("an unknown scope", good().set("macula.scope", "everywhere").bytes(), InvalidFile),
        ("prompts that are no array", good().set("macula.prompts", "a dog").bytes(), InvalidFile),
        ("prompts that are no strings", good().set("macula.prompts", "[1]").bytes(), InvalidFile),
        ("a budget of NaN", good().set("macula.budget", "NaN").bytes(), InvalidFile),
        ("a budget above one", good().set("macula.budget", "1.01").bytes(), InvalidFile),
        ("a budget and a threshold", good().set("macula.threshold", "0.1").bytes(), InvalidFile),
        ("an infinite threshold", good().without("macula.budget").set("macula.threshold", "inf").bytes(), InvalidFile),
        ("a negative number of steps", good().set("macula.steps", "-1").bytes(), InvalidFile),
        ("a seed above 2^64", good().set("macula.seed", "18446744073709551616").bytes(), InvalidFile),
        ("no hash", good().without("modelspec.hash_sha256").bytes(), InvalidFile),
        (
            "a wrong hash",
            Parts { right_hash: false, ..good() }.set("modelspec.hash_sha256", "0x00").bytes(),
            InvalidFile,
        ),
        ("an empty payload", one(vec![]), InvalidFile),
        ("a payload shorter than its header", one(vec![1; 12]), InvalidFile),
        ("no rows", one(payload(0, 6, 0, 0, &[])), InvalidFile),
        ("no columns", one(payload(8, 0, 0, 0, &[])), InvalidFile),
        ("more weights than a projection has", one(payload(u32::MAX, 2, 0, 0, &[])), InvalidFile),
        ("2^64 weights", one(payload(u32::MAX, u32::MAX, 0, 0, &[])), InvalidFile),
        ("more columns than a column number has", one(payload(1, 65_537, 0, 0, &[])), InvalidFile),
        ("more indices than weights", one(payload(2, 3, 7, 0, &[0x7f])), InvalidFile),
        ("many indices in no bytes", one(payload(1 << 12, 1 << 12, 1 << 24, 31, &[])), InvalidFile),
        ("a Rice parameter of 32", one(payload(8, 6, 1, 32, &[0, 0, 0, 0, 1])), InvalidFile),
        ("a Rice parameter of 127", one(payload(8, 6, 0, 127, &[])), InvalidFile),
        ("fewer ones than indices", one(payload(8, 6, 3, 0, &[0b11])), InvalidFile),
        ("more ones than indices", one(payload(8, 6, 1, 0, &[0b11])), InvalidFile),
        ("an index outside, in the unary stream", one(payload(2, 3, 1, 0, &[0b0100_0000])), InvalidFile),
        ("an index outside, in the low stream", one(payload(2, 3, 1, 3, &[7, 1])), InvalidFile),
        ("an index far outside", one(payload(2, 3, 1, 31, &[0xff, 0xff, 0xff, 0x7f, 0, 0x80])), InvalidFile),
        ("an index outside a sparse set", one(payload(100, 100, 1, 14, &[0xff, 0x3f, 1])), InvalidFile),
        ("a byte after the unary stream", one(payload(8, 6, 1, 0, &[1, 0])), InvalidFile),
        ("bytes where nothing is coded", one(payload(8, 6, 0, 0, &[0])), InvalidFile),
        ("bits after the low stream", one(payload(8, 6, 1, 2, &[0b100, 1])), InvalidFile),
        (
            "full sets of 2^28 weights, 16 times",
            {
                let bomb = full_of(1 << 28);
                Parts::payload(&vec![bomb.as_slice(); 16]).bytes()
            },
            LimitExceeded,
        ),
    ];
    for key in
        ["macula.format", "macula.base", "macula.role", "macula.values", "modelspec.title", "modelspec.architecture"]
    {
        all.push((key, good().without(key).bytes(), InvalidFile));
    }
    all
}

#[test]
fn no_attack_file_is_taken() {
    assert_eq!(Concept::from_bytes(&Parts::good().bytes()).unwrap(), concept(), "the parts make a good file");
    let with_values = Parts::good().values("float16", "F16", [5, 40], 2, 0).bytes();
    assert_eq!(Concept::from_bytes(&with_values).unwrap().values.unwrap().layer(1), [0.0; 40], "these too");
    let with_rows = Concept::from_bytes(&Parts::good().rows(&["0", "1"], 0).bytes()).unwrap().token.unwrap();
    assert_eq!((with_rows.word(), with_rows.rows()), ("<s1>", &[vec![0.0; 2], vec![0.0; 2]][..]), "and these");
    assert!(Concept::from_bytes(&Parts::payload(&[&payload(8, 6, 1, 0, &[1])]).bytes()).is_ok());
    let attacks = attacks();
    assert!(attacks.len() >= 40);
    let folder = tempfile::tempdir().unwrap();
    for (what, bytes, status) in attacks {
        let path = folder.path().join("attack.safetensors");
        std::fs::write(&path, &bytes).unwrap();
        match Concept::load(&path) {
            Ok(_) => panic!("{what}: taken"),
            Err(error) => {
                assert_eq!(error.status(), status, "{what}: {error}");
                assert!(error.message().contains("attack.safetensors"), "{what}: {error}");
                assert!(error.message().len() < 1000, "{what}: {error}");
            }
        }
    }
}

#[test]
fn a_foreign_file_is_told_by_its_name() {
    for (what, says) in [("a LoRA", "LoRA"), ("a whole model", "whole model"), ("a wrong hash", "damaged")] {
        let (_, bytes, _) = attacks().into_iter().find(|(name, ..)| *name == what).unwrap();
        let error = Concept::from_bytes(&bytes).unwrap_err();
        assert!(error.message().contains(says), "{error}");
    }
}

#[test]
fn no_truncation_is_taken_and_no_flipped_bit_changes_a_set() {
    let concept = concept();
    let bytes = concept.to_bytes().unwrap();
    for end in 0..bytes.len() {
        assert_eq!(Concept::from_bytes(&bytes[..end]).unwrap_err().status(), Status::InvalidFile, "{end}");
    }
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        match Concept::from_bytes(&flipped) {
            // Some letter of a name or of free text.
            Ok(other) => {
                let members = |concept: &Concept| -> Vec<Vec<u32>> {
                    let mut sets: Vec<_> =
                        concept.neurons.layers().iter().map(|layer| layer.indices().iter().collect()).collect();
                    sets.sort();
                    sets
                };
                assert_eq!(members(&other), members(&concept), "{bit}");
            }
            Err(error) => assert!(
                matches!(error.status(), Status::InvalidFile | Status::Unsupported | Status::LimitExceeded),
                "{bit}: {error}"
            ),
        }
    }
}

#[test]
#[cfg(unix)]
fn what_is_no_regular_file_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let status = |name: &str| Concept::load(folder.path().join(name)).unwrap_err().status();
    assert_eq!(status("missing.safetensors"), Status::NotFound);
    assert_eq!(status("."), Status::InvalidFile);
    assert!(Command::new("mkfifo").arg(folder.path().join("pipe")).status().unwrap().success());
    assert_eq!(status("pipe"), Status::InvalidFile);
    assert_eq!(Concept::load("/dev/zero").unwrap_err().status(), Status::InvalidFile);
    std::os::unix::fs::symlink("loop", folder.path().join("loop")).unwrap();
    assert!(Concept::load(folder.path().join("loop")).is_err());
    let large = std::fs::File::create(folder.path().join("large")).unwrap();
    large.set_len(MAX_FILE_BYTES + 1).unwrap();
    assert_eq!(status("large"), Status::LimitExceeded);
}
