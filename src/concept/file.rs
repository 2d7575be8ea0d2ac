//! The concept file: a set of neurons and where it comes from, as a `.safetensors` file.
//!
//! It knows no model: whether a concept fits a base is asked where it is applied.
//!
//! # Format, version 1
//! A safetensors file: 8 bytes length of the header (little-endian), the header (JSON, padded with spaces to a multiple
//! of 8 bytes), the data. Our header is at most 8 MiB, names no key twice, and lists tensors whose offsets cover the data
//! without gap or overlap. Any safetensors reader opens the file.
//!
//! **Tensors.** One per projection that was looked at, named by its diffusers module path and `.neurons`, for example
//! `down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.neurons`: dtype `U8`, shape `[bytes]`, in byte-wise order
//! of the paths. The bytes are the compressed indices (below), which count weights of the `[out, in]` layout:
//! `index = row * in_features + column`. A projection without neurons is listed too.
//!
//! If the concept has tuned values, there is a second tensor for each projection, named by its path and `.values`; all of
//! these come before the others. In ascending order of the indices it holds what each neuron's weight is while the concept
//! acts, in the weight's own unit: `F32 [count]`, `F16 [count]`, or `U8 [bytes]` for codes of 1 or 2 bits: first the 2 or
//! 4 levels as `f32`, ascending, then a code a value, the first in the lowest bits, then zero bits.
//!
//! If the embedding of a word was learnt (`macula.token`), there is a tensor `text_encoder.N.token` for each text encoder
//! N = 0, 1, ... of the model: `F32 [width]`, the row that takes the place of the word's own in the encoder's table. These
//! come first of all. There are no other tensors.
//!
//! **Payload.** Numbers are little-endian; bit `i` of a stream is bit `i % 8` of its byte `i / 8`.
//!
//! | bytes | what |
//! |---|---|
//! | 0..4, 4..8, 8..12 | `out_features`, `in_features`, `count` as `u32` |
//! | 12 | bits 0..7: the Rice parameter `r`, 0..=31; bit 7: the *complement* is coded |
//! | 13.. | low stream, `ceil(count * r / 8)` bytes: the low `r` bits of each gap, lowest first, then zero bits |
//! | ..end | unary stream: for each gap, `gap >> r` zero bits and a one, then zero bits to the end of the byte |
//!
//! A gap is `index[i] - index[i - 1] - 1`, with `index[-1] = -1`. If more than half of the weights are members, the
//! indices of the others are coded and bit 7 is set. Any `r` is read; the writer takes the least one of least total bits.
//!
//! **Metadata** (`__metadata__`, strings):
//!
//! | key | value |
//! |---|---|
//! | `macula.format` * | `1` |
//! | `macula.base` * | the base model's [`Fingerprint`], 64 hexadecimal digits |
//! | `macula.role` * | `implant` (shutting the neurons draws the subject) or `erase` (shutting them removes it) |
//! | `macula.values` * | `none`: members are shut; or how their tuned values are kept: `binary`, `quaternary`, `float16` or `float32` |
//! | `macula.scope` | default scope: `global` (every token) or `local` (the rows of the concept's own tokens); `global` if absent |
//! | `macula.method` | how the set was found, free text |
//! | `macula.trigger`, `macula.class_noun` | the subject's word, e.g. `<s1>`, and its class, e.g. `dog` |
//! | `macula.token` | the word whose embedding was learnt, a single token of the model's tokenizers; there are rows if it is there |
//! | `macula.prompts` | the prompts of the search: a JSON array of strings |
//! | `macula.budget` or `macula.threshold` | what bounded the set: a share of the weights in `[0, 1]`, or the least score; decimal |
//! | `macula.steps`, `macula.seed` | steps and seed of the search, decimal `u64` |
//! | `modelspec.sai_model_spec` * | `1.0.1`: the other `modelspec.` keys are those of the Stability AI model metadata standard |
//! | `modelspec.architecture` * | the base's architecture and `/concept-neurons`, e.g. `stable-diffusion-v1/concept-neurons` |
//! | `modelspec.implementation` * | `macula` |
//! | `modelspec.title` * | a name for people |
//! | `modelspec.date` | ISO 8601 |
//! | `modelspec.trigger_phrase` | trigger word and class noun |
//! | `modelspec.hash_sha256` * | `0x` and the SHA-256 of the data (all that follows the header), checked on reading |
//!
//! Keys marked * must be there. Other keys are kept.
//!
//! `models/reference/concept_file.py` reads and writes the same format in NumPy.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use safetensors::SafeTensors;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use sha2::{Digest, Sha256};

use super::codec;
use super::fingerprint::Fingerprint;
use super::set::{Layer, NeuronSet};
use super::token::{LearntToken, MAX_TEXT_ENCODERS};
use super::values::{Precision, Values};
use crate::error::{Error, Result};
use crate::os;

/// The version of the format that is written, and the only one that is read.
pub const FORMAT_VERSION: &str = "1";

/// The longest header of a concept file that is read.
pub const MAX_HEADER_BYTES: u64 = 8 << 20;

/// The largest concept file that is read: 1 GiB; a set at SDXL size takes at most 43 MB.
pub const MAX_FILE_BYTES: u64 = 1 << 30;

/// The most weights that the projections of one file may have together: six times those of SDXL. Bitmaps of as many bits
/// take 256 MiB.
pub const MAX_FILE_WEIGHTS: u64 = 1 << 31;

const NEURONS_SUFFIX: &str = ".neurons";
const VALUES_SUFFIX: &str = ".values";

const TOKEN_PREFIX: &str = "text_encoder.";
const TOKEN_SUFFIX: &str = ".token";

const FORMAT: &str = "macula.format";
const BASE: &str = "macula.base";
const ROLE: &str = "macula.role";
const VALUES: &str = "macula.values";
const SCOPE: &str = "macula.scope";
const METHOD: &str = "macula.method";
const TRIGGER: &str = "macula.trigger";
const CLASS_NOUN: &str = "macula.class_noun";
const TOKEN: &str = "macula.token";
const PROMPTS: &str = "macula.prompts";
const BUDGET: &str = "macula.budget";
const THRESHOLD: &str = "macula.threshold";
const STEPS: &str = "macula.steps";
const SEED: &str = "macula.seed";
const SPEC: &str = "modelspec.sai_model_spec";
const ARCHITECTURE: &str = "modelspec.architecture";
const IMPLEMENTATION: &str = "modelspec.implementation";
const TITLE: &str = "modelspec.title";
const DATE: &str = "modelspec.date";
const TRIGGER_PHRASE: &str = "modelspec.trigger_phrase";
const HASH: &str = "modelspec.hash_sha256";

/// What shutting a concept's neurons does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// It draws the subject (Cones).
    Implant,
    /// It removes the subject.
    Erase,
}

/// Where a concept acts unless the host says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// On every token of every prompt, the unconditional one too (Cones).
    Global,
    /// On the rows of the concept's own tokens only.
    Local,
}

/// What bounded a set while it was searched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Selection {
    /// A share of the weights, in `[0, 1]`.
    Budget(f64),
    /// The least score of a member (tau of Algorithm 1).
    Threshold(f64),
}

/// Where a concept comes from.
#[derive(Clone, Debug, PartialEq)]
pub struct Metadata {
    /// The base model on which the concept was found.
    pub base: Fingerprint,
    /// What shutting the neurons does.
    pub role: Role,
    /// Where the concept acts by default.
    pub scope: Scope,
    /// How the set was found; may be empty, as all texts below.
    pub method: String,
    /// The subject's word in prompts, e.g. `<s1>`.
    pub trigger: String,
    /// The subject's class, e.g. `dog`.
    pub class_noun: String,
    /// The prompts of the search.
    pub prompts: Vec<String>,
    /// What bounded the set.
    pub selection: Option<Selection>,
    /// Steps of the search.
    pub steps: Option<u64>,
    /// Seed of the search.
    pub seed: Option<u64>,
    /// A name for people.
    pub title: String,
    /// ModelSpec architecture, e.g. `stable-diffusion-v1/concept-neurons`.
    pub architecture: String,
    /// ISO 8601.
    pub date: String,
    /// All other keys, e.g. `modelspec.author`. Keys of the fields above are ignored here.
    pub other: BTreeMap<String, String>,
}

impl Metadata {
    /// Metadata of an implanting, global concept that was made today.
    pub fn new(base: Fingerprint, title: impl Into<String>, architecture: impl Into<String>) -> Self {
        Self {
            base,
            role: Role::Implant,
            scope: Scope::Global,
            method: String::new(),
            trigger: String::new(),
            class_noun: String::new(),
            prompts: Vec::new(),
            selection: None,
            steps: None,
            seed: None,
            title: title.into(),
            architecture: architecture.into(),
            date: today(),
            other: BTreeMap::new(),
        }
    }

    /// Its keys and values as they stand in a file.
    fn entries(&self) -> BTreeMap<String, String> {
        let mut entries = self.other.clone();
        let mut set = |key: &str, value: String| entries.insert(key.to_string(), value);
        set(FORMAT, FORMAT_VERSION.into());
        set(BASE, self.base.to_string());
        set(
            ROLE,
            match self.role {
                Role::Implant => "implant",
                Role::Erase => "erase",
            }
            .into(),
        );
        set(
            SCOPE,
            match self.scope {
                Scope::Global => "global",
                Scope::Local => "local",
            }
            .into(),
        );
        set(SPEC, "1.0.1".into());
        set(ARCHITECTURE, self.architecture.clone());
        set(IMPLEMENTATION, "macula".into());
        set(TITLE, self.title.clone());
        for (key, text) in
            [(METHOD, &self.method), (TRIGGER, &self.trigger), (CLASS_NOUN, &self.class_noun), (DATE, &self.date)]
        {
            if !text.is_empty() {
                set(key, text.clone());
            }
        }
        if !self.trigger.is_empty() {
            set(TRIGGER_PHRASE, format!("{} {}", self.trigger, self.class_noun).trim_end().to_string());
        }
        if !self.prompts.is_empty() {
            set(PROMPTS, serde_json::Value::from(self.prompts.clone()).to_string());
        }
        match self.selection {
            Some(Selection::Budget(budget)) => _ = set(BUDGET, budget.to_string()),
            Some(Selection::Threshold(threshold)) => _ = set(THRESHOLD, threshold.to_string()),
            None => {}
        }
        for (key, number) in [(STEPS, self.steps), (SEED, self.seed)] {
            if let Some(number) = number {
                set(key, number.to_string());
            }
        }
        entries
    }

    /// Reads what [`Metadata::entries`] gives.
    fn from_entries(mut entries: BTreeMap<String, String>) -> Result<Self> {
        let mut take = |key: &str| entries.remove(key);
        let required = |key: &str, value: Option<String>| {
            value.ok_or_else(|| Error::invalid_file(format!("the metadata lacks {key}")))
        };
        let unknown = |key: &str, value: &str| Error::invalid_file(format!("{key} is {value:?}, which is not known"));
        take(FORMAT);
        take(VALUES);
        take(TOKEN);
        for key in [SPEC, IMPLEMENTATION] {
            required(key, take(key))?;
        }
        take(TRIGGER_PHRASE);
        let base = required(BASE, take(BASE))?;
        let role = match required(ROLE, take(ROLE))?.as_str() {
            "implant" => Role::Implant,
            "erase" => Role::Erase,
            role => return Err(unknown(ROLE, role)),
        };
        let scope = match take(SCOPE).as_deref() {
            Some("global") | None => Scope::Global,
            Some("local") => Scope::Local,
            Some(scope) => return Err(unknown(SCOPE, scope)),
        };
        let selection = match (take(BUDGET), take(THRESHOLD)) {
            (Some(_), Some(_)) => {
                return Err(Error::invalid_file(format!("{BUDGET} and {THRESHOLD} exclude each other")));
            }
            (Some(budget), None) => Some(Selection::Budget(number(BUDGET, &budget, |b| (0.0..=1.0).contains(b))?)),
            (None, Some(threshold)) => {
                Some(Selection::Threshold(number(THRESHOLD, &threshold, |t: &f64| t.is_finite())?))
            }
            (None, None) => None,
        };
        let prompts = match take(PROMPTS) {
            Some(prompts) => serde_json::from_str(&prompts).map_err(|error| {
                Error::invalid_file(format!("{PROMPTS} is not a JSON array of strings")).caused_by(error)
            })?,
            None => Vec::new(),
        };
        let count = |key: &str, value: Option<String>| value.map(|value| number(key, &value, |_| true)).transpose();
        Ok(Self {
            base: base.parse().map_err(|error: Error| Error::invalid_file(error.message()).at(BASE))?,
            role,
            scope,
            method: take(METHOD).unwrap_or_default(),
            trigger: take(TRIGGER).unwrap_or_default(),
            class_noun: take(CLASS_NOUN).unwrap_or_default(),
            prompts,
            selection,
            steps: count(STEPS, take(STEPS))?,
            seed: count(SEED, take(SEED))?,
            title: required(TITLE, take(TITLE))?,
            architecture: required(ARCHITECTURE, take(ARCHITECTURE))?,
            date: take(DATE).unwrap_or_default(),
            other: entries,
        })
    }
}

fn number<T: std::str::FromStr>(key: &str, value: &str, valid: impl Fn(&T) -> bool) -> Result<T> {
    value
        .parse()
        .ok()
        .filter(valid)
        .ok_or_else(|| Error::invalid_file(format!("{key} is {value:?}, which is not a number in its range")))
}

/// The date in UTC as ISO 8601; empty if the clock stands before 1970.
fn today() -> String {
    let Ok(since) = SystemTime::now().duration_since(UNIX_EPOCH) else { return String::new() };
    // Days to civil date in the proleptic Gregorian calendar, years beginning in March, eras of 400 years.
    let days = since.as_secs() / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

/// A set of neurons, what their weights become, a word that was learnt with it, and where it comes from.
#[derive(Clone, Debug, PartialEq)]
pub struct Concept {
    /// Where it comes from.
    pub metadata: Metadata,
    /// The neurons.
    pub neurons: NeuronSet,
    /// What their weights become; `None` where they are shut.
    pub values: Option<Values>,
    /// The word whose embedding was learnt, if any.
    pub token: Option<LearntToken>,
}

impl Concept {
    /// All keys and values of the metadata as they stand in a file, without the hash of the data.
    pub fn entries(&self) -> BTreeMap<String, String> {
        let mut entries = self.metadata.entries();
        let values = self.values.as_ref().map_or("none", |values| values.precision().name());
        entries.insert(VALUES.into(), values.into());
        match &self.token {
            Some(token) => _ = entries.insert(TOKEN.into(), token.word().into()),
            None => _ = entries.remove(TOKEN),
        }
        entries
    }

    /// Reads a concept file into owned memory; the file is not kept open.
    ///
    /// Errors: `NotFound`, `Io`; `InvalidFile` if it is damaged, truncated or not a concept file; `Unsupported` if its
    /// format is newer; `LimitExceeded`; `OutOfMemory`.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        read(path).and_then(|bytes| Self::from_bytes(&bytes)).map_err(|error| error.at(path.display()))
    }

    /// Reads the content of a concept file. Errors as [`Concept::load`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let (header, data) = split(bytes)?;
        let mut entries = header.metadata.0;
        match entries.get(FORMAT).map(String::as_str) {
            Some(FORMAT_VERSION) => {}
            Some(version) => {
                return Err(Error::unsupported(format!(
                    "the concept file has format {version:?}; this version reads format {FORMAT_VERSION}"
                )));
            }
            None => return Err(foreign(&header.tensors)),
        }
        let hash = entries.remove(HASH).ok_or_else(|| Error::invalid_file(format!("the metadata lacks {HASH}")))?;
        let precision = match entries.get(VALUES).map(String::as_str) {
            Some("none") => None,
            Some(name) => Some(Precision::ALL.into_iter().find(|known| known.name() == name).ok_or_else(|| {
                Error::unsupported(format!("{VALUES} is {name:?}, which this version does not know"))
            })?),
            None => return Err(Error::invalid_file(format!("the metadata lacks {VALUES}"))),
        };
        let word = entries.get(TOKEN).cloned();
        let metadata = Metadata::from_entries(entries)?;
        check_tensors(&header.tensors, data.len(), precision, word.is_some())?;
        if hash != sha256(data) {
            return Err(Error::invalid_file(format!(
                "the file is damaged: its data has the hash {}, its header says {hash}",
                sha256(data)
            )));
        }
        let tensors =
            SafeTensors::deserialize(bytes).map_err(|error| Error::invalid_file(error.to_string()).caused_by(error))?;
        let mut layers = Vec::new();
        let mut weights = 0;
        for (name, tensor) in tensors.iter() {
            let Some(path) = name.strip_suffix(NEURONS_SUFFIX) else { continue };
            let layer = || {
                weights += u64::from(codec::header(tensor.data())?.weights);
                if weights > MAX_FILE_WEIGHTS {
                    return Err(Error::limit_exceeded(format!(
                        "the projections have more than {MAX_FILE_WEIGHTS} weights together"
                    )));
                }
                let (header, indices) = codec::decode(tensor.data())?;
                Layer::new(path, header.out_features, header.in_features, indices)
                    .map_err(|error| Error::invalid_file(error.message()))
            };
            layers.push({ layer }().map_err(|error: Error| error.at(format_args!("tensor {name:?}")))?);
        }
        let neurons = NeuronSet::new(layers)?;
        let values = precision.map(|precision| values(precision, &neurons, &tensors)).transpose()?;
        let token = word.map(|word| learnt_token(word, &tensors)).transpose()?;
        Ok(Self { metadata, neurons, values, token })
    }

    /// The content of the concept file; the same concept always gives the same bytes.
    ///
    /// Errors: `LimitExceeded` if the metadata does not fit in a header; `OutOfMemory`.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut tensors = Vec::new();
        let mut data = Vec::new();
        let mut add = |name: String, dtype: &str, shape: usize, payload: &[u8]| {
            data.try_reserve(payload.len())?;
            data.extend_from_slice(payload);
            let name = serde_json::Value::from(name);
            let end = data.len();
            let begin = end - payload.len();
            tensors.push(format!(r#"{name}:{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{begin},{end}]}}"#));
            Ok::<(), Error>(())
        };
        for (encoder, row) in self.token.iter().flat_map(LearntToken::rows).enumerate() {
            let payload: Vec<u8> = row.iter().flat_map(|value| value.to_le_bytes()).collect();
            add(token_tensor(encoder), "F32", row.len(), &payload)?;
        }
        if let Some(values) = &self.values {
            values.check(&self.neurons)?;
            for (at, layer) in self.neurons.layers().iter().enumerate() {
                let payload = values.encode(at)?;
                let (dtype, bytes) = dtype_of(values.precision());
                let name = format!("{}{VALUES_SUFFIX}", layer.path());
                add(name, dtype, payload.len() / bytes as usize, &payload)?;
            }
        }
        for layer in self.neurons.layers() {
            let payload = codec::encode(layer.out_features(), layer.in_features(), layer.indices())?;
            add(format!("{}{NEURONS_SUFFIX}", layer.path()), "U8", payload.len(), &payload)?;
        }
        let mut entries = self.entries();
        entries.insert(HASH.into(), sha256(&data));
        let mut bytes = vec![0; 8];
        let written = (|| {
            write!(bytes, "{{\"__metadata__\":")?;
            serde_json::to_writer(&mut bytes, &entries)?;
            for tensor in &tensors {
                write!(bytes, ",{tensor}")?;
            }
            write!(bytes, "}}")
        })();
        written.map_err(|error: std::io::Error| Error::io("writing the header", error))?;
        bytes.resize(bytes.len().next_multiple_of(8), b' ');
        let header_bytes = bytes.len() as u64 - 8;
        if header_bytes > MAX_HEADER_BYTES {
            return Err(Error::limit_exceeded(format!(
                "the header would have {header_bytes} bytes, more than {MAX_HEADER_BYTES}"
            )));
        }
        bytes[..8].copy_from_slice(&header_bytes.to_le_bytes());
        bytes.try_reserve(data.len())?;
        bytes.extend_from_slice(&data);
        Ok(bytes)
    }

    /// Writes a concept file: to a temporary file beside it, synchronised, then renamed. On failure what was at `path`
    /// stays as it was.
    ///
    /// Errors: as [`Concept::to_bytes`]; `NotFound` or `Io`.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let bytes = self.to_bytes()?;
        os::replace_file(path, &bytes).map_err(|error| Error::io(path.display(), error))
    }
}

fn sha256(data: &[u8]) -> String {
    Sha256::digest(data).iter().fold("0x".to_string(), |text, byte| format!("{text}{byte:02x}"))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let io = |error| Error::io("reading the concept file", error);
    // Asked before opening: opening a pipe would wait for its writer.
    let about = fs::metadata(path).map_err(io)?;
    if !about.is_file() {
        return Err(Error::invalid_file("not a regular file"));
    }
    let too_large = || Error::limit_exceeded(format!("a concept file has at most {MAX_FILE_BYTES} bytes"));
    if about.len() > MAX_FILE_BYTES {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(about.len() as usize)?;
    File::open(path).map_err(io)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > MAX_FILE_BYTES { Err(too_large()) } else { Ok(bytes) }
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Tensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// A JSON object of strings that names no key twice.
#[derive(Default)]
struct Texts(BTreeMap<String, String>);

#[derive(Default)]
struct Header {
    metadata: Texts,
    tensors: HashMap<String, Tensor>,
}

fn twice<E: serde::de::Error>(key: &str) -> E {
    E::custom(format_args!("key {key:?} comes twice"))
}

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Texts;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Texts, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, String>()? {
                    if entries.contains_key(&key) {
                        return Err(twice(&key));
                    }
                    entries.insert(key, value);
                }
                Ok(Texts(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a safetensors header")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut header = Header::default();
                let mut metadata = None;
                while let Some(key) = map.next_key::<String>()? {
                    if key == "__metadata__" {
                        if metadata.replace(map.next_value()?).is_some() {
                            return Err(twice(&key));
                        }
                    } else {
                        if header.tensors.contains_key(&key) {
                            return Err(twice(&key));
                        }
                        let tensor = map.next_value()?;
                        header.tensors.insert(key, tensor);
                    }
                }
                header.metadata = metadata.unwrap_or_default();
                Ok(header)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// Parts a file into its header and its data.
fn split(bytes: &[u8]) -> Result<(Header, &[u8])> {
    let not_safetensors = |what: String| Error::invalid_file(format!("not a whole safetensors file: {what}"));
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(not_safetensors(format!("it has {} bytes", bytes.len())));
    };
    let length = u64::from_le_bytes(*length);
    if length > rest.len() as u64 {
        return Err(not_safetensors(format!("its header would take {length} bytes of {}", rest.len())));
    }
    if length > MAX_HEADER_BYTES {
        return Err(Error::limit_exceeded(format!("a header of {length} bytes is above {MAX_HEADER_BYTES}")));
    }
    let (header, data) = rest.split_at(length as usize);
    if header.first() != Some(&b'{') {
        return Err(not_safetensors("its header is not a JSON object".into()));
    }
    let header = serde_json::from_slice(header)
        .map_err(|error| Error::invalid_file(format!("the safetensors header is wrong: {error}")).caused_by(error))?;
    Ok((header, data))
}

/// How a file types values, and the bytes of an element.
fn dtype_of(precision: Precision) -> (&'static str, u64) {
    match precision {
        Precision::Binary | Precision::Quaternary => ("U8", 1),
        Precision::F16 => ("F16", 2),
        Precision::F32 => ("F32", 4),
    }
}

/// The values of a set from the file's tensors, whose names and types were checked.
fn values(precision: Precision, neurons: &NeuronSet, tensors: &SafeTensors<'_>) -> Result<Values> {
    let layers = neurons.layers().iter().map(|layer| {
        let name = format!("{}{VALUES_SUFFIX}", layer.path());
        let tensor = tensors.tensor(&name).map_err(|error| Error::invalid_file(error.to_string()).caused_by(error))?;
        Values::decode(precision, tensor.data(), layer.indices().len()).map_err(|error| error.at(name))
    });
    Values::new(precision, neurons, layers.collect::<Result<_>>()?)
        .map_err(|error| Error::invalid_file(error.message()))
}

/// The name of the learnt row for a text encoder.
fn token_tensor(encoder: usize) -> String {
    format!("{TOKEN_PREFIX}{encoder}{TOKEN_SUFFIX}")
}

/// A learnt word from the file's tensors, whose names and types were checked.
fn learnt_token(word: String, tensors: &SafeTensors<'_>) -> Result<LearntToken> {
    let rows = (0..MAX_TEXT_ENCODERS).map_while(|encoder| tensors.tensor(&token_tensor(encoder)).ok());
    let rows: Vec<Vec<f32>> = rows
        .map(|tensor| tensor.data().as_chunks::<4>().0.iter().map(|number| f32::from_le_bytes(*number)).collect())
        .collect();
    let listed = tensors.names().into_iter().filter(|name| name.ends_with(TOKEN_SUFFIX)).count();
    if listed != rows.len() {
        return Err(Error::invalid_file(format!(
            "the learnt rows of {word:?} are not numbered from 0 on: {} of {listed} follow one another",
            rows.len()
        )));
    }
    LearntToken::new(word, rows).map_err(|error| Error::invalid_file(error.message()))
}

/// Names and types are ours, and offsets cover the data without gap or overlap.
fn check_tensors(
    tensors: &HashMap<String, Tensor>,
    data_bytes: usize,
    values: Option<Precision>,
    token: bool,
) -> Result<()> {
    let mut in_order: Vec<(&String, &Tensor)> = tensors.iter().collect();
    in_order.sort_by_key(|(name, tensor)| (tensor.data_offsets, name.as_str()));
    let mut next = 0;
    for (name, tensor) in in_order {
        let wrong = |what: String| Err(Error::invalid_file(format!("tensor {name:?} {what}")));
        let of_values = values.and_then(|precision| Some((precision, name.strip_suffix(VALUES_SUFFIX)?)));
        let number = name.strip_prefix(TOKEN_PREFIX).and_then(|rest| rest.strip_suffix(TOKEN_SUFFIX)).filter(|_| token);
        let (path, (dtype, bytes)) = match (name.strip_suffix(NEURONS_SUFFIX), of_values, number) {
            (Some(path), _, _) => (path, ("U8", 1u64)),
            (None, Some((precision, path)), _) => (path, dtype_of(precision)),
            (None, None, Some(number)) => (number, ("F32", 4)),
            (None, None, None) => ("", ("U8", 1u64)),
        };
        if path.is_empty() {
            let or_values = if values.is_some() { format!(" or {VALUES_SUFFIX:?}") } else { String::new() };
            return wrong(format!("is not named by a module path and {NEURONS_SUFFIX:?}{or_values}"));
        }
        if of_values.is_some() && !tensors.contains_key(&format!("{path}{NEURONS_SUFFIX}")) {
            return wrong("has no neurons".into());
        }
        let (begin, end) = tensor.data_offsets;
        if begin != next || end < begin {
            return wrong(format!("lies at {begin}..{end}, but the tensor before it ends at {next}"));
        }
        let elements = (end - begin) / bytes;
        if tensor.dtype != dtype || tensor.shape != [elements] || elements * bytes != end - begin {
            return wrong(format!("is {} {:?}, not {dtype} [{elements}]", tensor.dtype, tensor.shape));
        }
        next = end;
    }
    if next != data_bytes as u64 {
        return Err(Error::invalid_file(format!("the tensors end at {next}, but the data has {data_bytes} bytes")));
    }
    Ok(())
}

/// The error for a safetensors file that is no concept file.
fn foreign(tensors: &HashMap<String, Tensor>) -> Error {
    let has = |part: &str| tensors.keys().any(|name| name.contains(part));
    let guess = if has("lora_down") || has("lora_A") || has("lora_up") {
        "; it looks like a LoRA"
    } else if has("attn2.to_k.weight") || has("model.diffusion_model.") {
        "; it looks like a whole model"
    } else {
        ""
    };
    let example = tensors.keys().min().map(|name| format!(", for example {name:?}")).unwrap_or_default();
    Error::invalid_file(format!(
        "a safetensors file, but not a concept file: its metadata lacks {FORMAT}, it holds {} tensors{example}{guess}",
        tensors.len()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn today_is_a_date_of_this_century() {
        let date = today();
        assert_eq!(date.len(), 10);
        assert!(("2025-01-01".to_string().."2100-01-01".to_string()).contains(&date));
    }
}
