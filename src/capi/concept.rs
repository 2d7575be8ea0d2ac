//! Concepts
//!
//! A concept is a set of scalar weights of the K and V projections of cross-attention, or of self-attention if that was
//! asked for, and where it comes from: the base model that it was found on, the subject's word, how it was searched. It lives in a `.safetensors` file that any
//! safetensors reader opens. A projection is named by its diffusers module path, for example
//! `down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k`; a weight is counted in the layout
//! `[out_features, in_features]`: `index = row * in_features + column`.
//!
//! A concept never changes after it was made, so any number of threads may use one handle at the same time.

use std::ffi::{CString, c_char, c_void};

use super::argument::{self, Versioned, c_text, optional_text, out, path, reference, slice, text};
use super::guard::{guard, guard_free};
use super::handle::{Object, object};
use super::status::macula_status;
use super::tensor::{MACULA_DTYPE_F32, macula_tensor};
use crate::concept::{Concept, Fingerprint, Indices, Layer, Metadata, NeuronSet, Precision, Role, Scope, Values};
use crate::error::{Error, Result, Status};

/// What shutting a concept's neurons does: one of `MACULA_ROLE_*`.
pub type macula_role = i32;

/// It draws the subject: the set is meant for `macula_compose`.
pub const MACULA_ROLE_IMPLANT: macula_role = 0;

/// It removes the subject: the set is meant for `macula_ablate`.
pub const MACULA_ROLE_ERASE: macula_role = 1;

/// Where a concept acts: one of `MACULA_SCOPE_*`.
pub type macula_scope = i32;

/// As the concept's file says.
pub const MACULA_SCOPE_DEFAULT: macula_scope = 0;

/// On every token of every prompt, the negative one too (the paper's).
pub const MACULA_SCOPE_GLOBAL: macula_scope = 1;

/// On the tokens of the concept's own words only. K and V of cross-attention belong to one token each, so this is exact, and
/// concepts do not disturb each other. Neurons of self-attention act on the whole picture in either scope.
pub const MACULA_SCOPE_LOCAL: macula_scope = 2;

/// What the weights of a concept become, and how that is kept: one of `MACULA_VALUES_*`.
pub type macula_values = i32;

/// Nothing is kept: they are shut (Cones).
pub const MACULA_VALUES_NONE: macula_values = 0;

/// One of two tuned levels a projection: 1 bit a neuron.
pub const MACULA_VALUES_BINARY: macula_values = 1;

/// One of four tuned levels a projection: 2 bits a neuron.
pub const MACULA_VALUES_QUATERNARY: macula_values = 2;

/// A tuned value in IEEE half precision: 16 bits a neuron.
pub const MACULA_VALUES_FLOAT16: macula_values = 3;

/// A tuned value in IEEE single precision: 32 bits a neuron.
pub const MACULA_VALUES_FLOAT32: macula_values = 4;

/// The precision of a number; `None` for shut weights.
pub(super) fn precision(value: macula_values, field: &str) -> Result<Option<Precision>> {
    match value {
        MACULA_VALUES_NONE => Ok(None),
        MACULA_VALUES_BINARY => Ok(Some(Precision::Binary)),
        MACULA_VALUES_QUATERNARY => Ok(Some(Precision::Quaternary)),
        MACULA_VALUES_FLOAT16 => Ok(Some(Precision::F16)),
        MACULA_VALUES_FLOAT32 => Ok(Some(Precision::F32)),
        other => Err(Error::invalid_argument(format!("{field} is {other}, not a MACULA_VALUES_*"))),
    }
}

fn values_number(precision: Option<Precision>) -> macula_values {
    match precision {
        None => MACULA_VALUES_NONE,
        Some(Precision::Binary) => MACULA_VALUES_BINARY,
        Some(Precision::Quaternary) => MACULA_VALUES_QUATERNARY,
        Some(Precision::F16) => MACULA_VALUES_FLOAT16,
        Some(Precision::F32) => MACULA_VALUES_FLOAT32,
    }
}

/// A set of neurons, what their weights become, and where it comes from.
pub struct macula_concept {
    pub(super) concept: Concept,
    fingerprint: CString,
    trigger: CString,
    class_noun: CString,
    title: CString,
    method: CString,
    architecture: CString,
    entries: Vec<(CString, CString)>,
    paths: Vec<CString>,
}
object!(macula_concept, 3);

impl macula_concept {
    pub(super) fn new(concept: Concept) -> Self {
        let metadata = &concept.metadata;
        Self {
            fingerprint: c_text(&metadata.base.to_string()),
            trigger: c_text(&metadata.trigger),
            class_noun: c_text(&metadata.class_noun),
            title: c_text(&metadata.title),
            method: c_text(&metadata.method),
            architecture: c_text(&metadata.architecture),
            entries: concept.entries().iter().map(|(key, value)| (c_text(key), c_text(value))).collect(),
            paths: concept.neurons.layers().iter().map(|layer| c_text(layer.path())).collect(),
            concept,
        }
    }

    fn layer(&self, index: usize) -> Result<(&CString, &Layer)> {
        let layers = self.concept.neurons.layers();
        self.paths.get(index).zip(layers.get(index)).ok_or_else(|| {
            Error::invalid_argument(format!("layer is {index}, but the concept has {} layers", layers.len()))
        })
    }
}

impl macula_concept {
    /// A projection for whose neurons a host has made room.
    fn layer_of(&self, index: usize, room: usize) -> Result<&Layer> {
        let (path, layer) = self.layer(index)?;
        let neurons = layer.indices().len();
        if room != neurons {
            let path = path.to_string_lossy();
            return Err(Error::invalid_argument(format!("count is {room}, but {path} has {neurons} neurons")));
        }
        Ok(layer)
    }
}

/// What a concept is. The texts belong to the concept handle.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_concept_info {
    /// `sizeof` this struct.
    pub struct_size: usize,
    /// Fingerprint of the base model, 64 hexadecimal digits; never NULL.
    pub fingerprint: *const c_char,
    /// The subject's word in prompts, e.g. `"<s1>"`; `""` if there is none. The same for the next texts.
    pub trigger: *const c_char,
    /// The subject's class, e.g. `"dog"`.
    pub class_noun: *const c_char,
    /// A name for people.
    pub title: *const c_char,
    /// How the set was found.
    pub method: *const c_char,
    /// ModelSpec architecture, e.g. `"stable-diffusion-v1/concept-neurons"`.
    pub architecture: *const c_char,
    /// Number of projections that were looked at, for `macula_concept_get_layer`.
    pub layer_count: usize,
    /// Number of metadata entries, for `macula_concept_get_entry`.
    pub entry_count: usize,
    /// Number of weights in the set.
    pub neurons: u64,
    /// Number of weights that those projections have.
    pub weights: u64,
    /// `neurons / weights`, in 0 to 1.
    pub density: f64,
    /// Memory that the set takes, in bytes.
    pub memory_bytes: u64,
    /// What shutting the neurons does, `MACULA_ROLE_*`.
    pub role: macula_role,
    /// Where the concept acts unless told otherwise: `MACULA_SCOPE_GLOBAL` or `MACULA_SCOPE_LOCAL`.
    pub scope: macula_scope,
    /// What its weights become, `MACULA_VALUES_*`.
    pub values: macula_values,
    /// Zero.
    pub reserved: i32,
    /// Number of text encoders for which the embedding of its trigger was learnt, for `macula_concept_get_token_row`; 0 if
    /// it was not.
    pub token_row_count: usize,
}

impl Default for macula_concept_info {
    fn default() -> Self {
        let none = std::ptr::null();
        Self {
            struct_size: size_of::<Self>(),
            fingerprint: none,
            trigger: none,
            class_noun: none,
            title: none,
            method: none,
            architecture: none,
            layer_count: 0,
            entry_count: 0,
            neurons: 0,
            weights: 0,
            density: 0.0,
            memory_bytes: 0,
            role: 0,
            scope: 0,
            values: 0,
            reserved: 0,
            token_row_count: 0,
        }
    }
}

// SAFETY: repr(C), begins with its size; pointers and numbers take any bytes.
unsafe impl Versioned for macula_concept_info {
    const FIRST_SIZE: usize = 120;
}

/// One projection of a concept. The text belongs to the concept handle.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_layer_info {
    /// `sizeof` this struct.
    pub struct_size: usize,
    /// Diffusers module path; never NULL.
    pub path: *const c_char,
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
    /// Number of its weights in the set.
    pub neurons: usize,
}

impl Default for macula_layer_info {
    fn default() -> Self {
        Self { struct_size: size_of::<Self>(), path: std::ptr::null(), out_features: 0, in_features: 0, neurons: 0 }
    }
}

// SAFETY: repr(C), begins with its size; pointers and numbers take any bytes.
unsafe impl Versioned for macula_layer_info {
    const FIRST_SIZE: usize = 40;
}

/// One projection for `macula_concept_create`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_layer {
    /// Diffusers module path; not NULL, not empty, each only once.
    pub path: *const c_char,
    /// Rows of the weight, >= 1.
    pub out_features: usize,
    /// Columns of the weight, >= 1; `out_features * in_features` is at most 2^31.
    pub in_features: usize,
    /// `count` indices, strictly ascending, each below `out_features * in_features`; NULL only if there are none.
    pub indices: *const u32,
    /// Number of `indices`; 0 for a projection that was looked at and has no neurons.
    pub count: usize,
    /// What each neuron's weight becomes, `count` finite numbers in the weight's own unit; read if `values` of the options
    /// is not `MACULA_VALUES_NONE`. NULL otherwise, or if there are none.
    pub values: *const f32,
}

/// Where a new concept comes from.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_concept_options {
    /// `sizeof` this struct.
    pub struct_size: usize,
    /// Fingerprint of the base model, 64 hexadecimal digits, as in `macula_pipeline_info`; not NULL.
    /// Default: `NULL`.
    pub fingerprint: *const c_char,
    /// A name for people. May be NULL. Default: `NULL`.
    pub title: *const c_char,
    /// The subject's word in prompts. May be NULL. Default: `NULL`.
    pub trigger: *const c_char,
    /// The subject's class. May be NULL. Default: `NULL`.
    pub class_noun: *const c_char,
    /// How the set was found. May be NULL. Default: `NULL`.
    pub method: *const c_char,
    /// ModelSpec architecture. May be NULL: `"stable-diffusion-v1/concept-neurons"`. Default: `NULL`.
    pub architecture: *const c_char,
    /// What shutting the neurons does. Default: `MACULA_ROLE_IMPLANT`.
    pub role: macula_role,
    /// Where it acts unless told otherwise; `MACULA_SCOPE_DEFAULT` stands for global. Default: `MACULA_SCOPE_GLOBAL`.
    pub scope: macula_scope,
    /// What the weights become, and how that is kept: values are rounded to it. Default: `MACULA_VALUES_NONE`.
    pub values: macula_values,
    /// Zero. Default: `0`.
    pub reserved: i32,
}

impl Default for macula_concept_options {
    fn default() -> Self {
        let none = std::ptr::null();
        Self {
            struct_size: size_of::<Self>(),
            fingerprint: none,
            title: none,
            trigger: none,
            class_noun: none,
            method: none,
            architecture: none,
            role: MACULA_ROLE_IMPLANT,
            scope: MACULA_SCOPE_GLOBAL,
            values: MACULA_VALUES_NONE,
            reserved: 0,
        }
    }
}

// SAFETY: repr(C), begins with its size; pointers and integers take any bytes.
unsafe impl Versioned for macula_concept_options {
    const FIRST_SIZE: usize = 72;
}

/// Reads a concept file. The file is read whole and closed; it may change or go away afterwards.
///
/// - `file`: path; not NULL.
/// - `out_concept`: receives the concept; not NULL. Free it with `macula_concept_free`.
///
/// Errors: `NOT_FOUND`, `IO`; `INVALID_FILE` for a damaged, truncated or foreign file; `UNSUPPORTED` for a newer format;
/// `LIMIT_EXCEEDED` above 1 GiB. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_concept_load(
    file: *const c_char,
    out_concept: *mut *mut macula_concept,
) -> macula_status {
    guard("macula_concept_load", |_| {
        // SAFETY: valid as the header asks.
        let (file, out_concept) = unsafe { (path(file, "file")?, out(out_concept, "out_concept")?) };
        out_concept.set(macula_concept::table().insert(macula_concept::new(Concept::load(file)?)));
        Ok(())
    })
}

/// Reads the content of a concept file from memory. The memory is not kept.
///
/// - `data`: the bytes; not NULL.
/// - `byte_len`: how many; as much as `data` holds.
/// - `out_concept`: receives the concept; not NULL. Free it with `macula_concept_free`.
///
/// Errors: as `macula_concept_load`. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_concept_load_bytes(
    data: *const c_void,
    byte_len: usize,
    out_concept: *mut *mut macula_concept,
) -> macula_status {
    guard("macula_concept_load_bytes", |_| {
        // SAFETY: valid as the header asks.
        unsafe {
            reference(data.cast::<u8>(), "data")?;
            let (data, out_concept) = (slice(data.cast::<u8>(), byte_len, "data")?, out(out_concept, "out_concept")?);
            out_concept.set(macula_concept::table().insert(macula_concept::new(Concept::from_bytes(data)?)));
        }
        Ok(())
    })
}

/// Makes a concept from lists of weights.
///
/// - `layers`: the projections that were looked at, `layer_count` of them, in any order; not NULL.
/// - `layer_count`: how many; >= 1.
/// - `options`: where it comes from; not NULL, because `fingerprint` has no default.
/// - `out_concept`: receives the concept; not NULL. Free it with `macula_concept_free`.
///
/// Errors: `INVALID_ARGUMENT` for indices that are not ascending or out of range, values that are missing or not finite, with
/// the projection's path. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_concept_create(
    layers: *const macula_layer,
    layer_count: usize,
    options: *const macula_concept_options,
    out_concept: *mut *mut macula_concept,
) -> macula_status {
    guard("macula_concept_create", |_| {
        // SAFETY: valid as the header asks.
        unsafe {
            reference(layers, "layers")?;
            reference(options, "options")?;
            let out_concept = out(out_concept, "out_concept")?;
            let options = argument::options(options, "options")?;
            let metadata = options.metadata()?;
            let precision = precision(options.values, "options.values")?;
            let mut given = slice(layers, layer_count, "layers")?.iter().map(|layer| layer.read(precision.is_some()));
            let mut given = given.by_ref().collect::<Result<Vec<_>>>()?;
            given.sort_by(|(a, _), (b, _)| a.path().cmp(b.path()));
            let (layers, values): (Vec<Layer>, Vec<Vec<f32>>) = given.into_iter().unzip();
            let neurons = NeuronSet::new(layers)?;
            let values = precision.map(|precision| Values::new(precision, &neurons, values)).transpose()?;
            let concept = Concept { metadata, neurons, values, token: None };
            out_concept.set(macula_concept::table().insert(macula_concept::new(concept)));
        }
        Ok(())
    })
}

impl macula_concept_options {
    /// # Safety
    /// Pointers are valid for what the fields' texts say.
    unsafe fn metadata(&self) -> Result<Metadata> {
        // SAFETY: as promised by the caller.
        let optional = |pointer, name| unsafe { optional_text(pointer, name) }.map(Option::unwrap_or_default);
        // SAFETY: as promised by the caller.
        let base: Fingerprint = unsafe { text(self.fingerprint, "options.fingerprint") }?.parse()?;
        let architecture = match optional(self.architecture, "options.architecture")? {
            "" => "stable-diffusion-v1/concept-neurons",
            given => given,
        };
        let mut metadata = Metadata::new(base, optional(self.title, "options.title")?, architecture);
        metadata.trigger = optional(self.trigger, "options.trigger")?.to_owned();
        metadata.class_noun = optional(self.class_noun, "options.class_noun")?.to_owned();
        metadata.method = optional(self.method, "options.method")?.to_owned();
        metadata.role = match self.role {
            MACULA_ROLE_IMPLANT => Role::Implant,
            MACULA_ROLE_ERASE => Role::Erase,
            other => return Err(Error::invalid_argument(format!("options.role is {other}, not a MACULA_ROLE_*"))),
        };
        metadata.scope = scope(self.scope, "options.scope")?.unwrap_or(Scope::Global);
        Ok(metadata)
    }
}

impl macula_layer {
    /// # Safety
    /// Pointers are valid for what the fields' texts say.
    unsafe fn read(&self, with_values: bool) -> Result<(Layer, Vec<f32>)> {
        // SAFETY: as promised by the caller.
        let (path, given) =
            unsafe { (text(self.path, "layers.path")?, slice(self.indices, self.count, "layers.indices")?) };
        let weights = self.out_features.checked_mul(self.in_features).and_then(|count| u32::try_from(count).ok());
        let weights = weights.ok_or_else(|| {
            Error::invalid_argument(format!(
                "{path}: {} x {} weights are too many",
                self.out_features, self.in_features
            ))
        })?;
        let mut indices = Vec::new();
        indices.try_reserve_exact(given.len())?;
        indices.extend_from_slice(given);
        let indices = Indices::from_sorted(weights, indices).map_err(|error| error.at(path))?;
        let mut values = Vec::new();
        if with_values {
            // SAFETY: as promised by the caller.
            let given = unsafe { slice(self.values, self.count, "layers.values") }.map_err(|error| error.at(path))?;
            values.try_reserve_exact(given.len())?;
            values.extend_from_slice(given);
        }
        Ok((Layer::new(path, self.out_features, self.in_features, indices)?, values))
    }
}

/// The scope of a number; `None` for the default.
pub(super) fn scope(value: macula_scope, field: &str) -> Result<Option<Scope>> {
    match value {
        MACULA_SCOPE_DEFAULT => Ok(None),
        MACULA_SCOPE_GLOBAL => Ok(Some(Scope::Global)),
        MACULA_SCOPE_LOCAL => Ok(Some(Scope::Local)),
        other => Err(Error::invalid_argument(format!("{field} is {other}, not a MACULA_SCOPE_*"))),
    }
}

/// Writes a concept file: to a temporary file beside it, then renamed, so that no reader sees half a file and a failure
/// leaves what was there.
///
/// - `subject`: a live concept; not NULL.
/// - `file`: path; not NULL. Name it `*.safetensors`.
///
/// Errors: `NOT_FOUND` if the folder is missing, `IO`. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_concept_save(subject: *const macula_concept, file: *const c_char) -> macula_status {
    guard("macula_concept_save", |call| {
        let concept = call.object(subject, "subject")?;
        // SAFETY: valid as the header asks.
        concept.concept.save(unsafe { path(file, "file") }?)
    })
}

/// Frees a concept. Compositions that use it keep what they need.
///
/// - `subject`: a live concept; may be NULL, then nothing happens.
///
/// Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_concept_free(subject: *mut macula_concept) -> macula_status {
    guard_free("macula_concept_free", subject)
}

/// What a concept is.
///
/// - `subject`: a live concept; not NULL.
/// - `out_info`: an initialised struct (`MACULA_CONCEPT_INFO_INIT`) to be filled in; not NULL.
///
/// Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_concept_get_info(
    subject: *const macula_concept,
    out_info: *mut macula_concept_info,
) -> macula_status {
    guard("macula_concept_get_info", |call| {
        let concept = call.object(subject, "subject")?;
        // SAFETY: valid as the header asks.
        let info = unsafe { argument::out_info(out_info, "out_info") }?;
        let Concept { metadata, neurons, values, token } = &concept.concept;
        let values = values.as_ref();
        info.set(macula_concept_info {
            struct_size: 0,
            fingerprint: concept.fingerprint.as_ptr(),
            trigger: concept.trigger.as_ptr(),
            class_noun: concept.class_noun.as_ptr(),
            title: concept.title.as_ptr(),
            method: concept.method.as_ptr(),
            architecture: concept.architecture.as_ptr(),
            layer_count: concept.paths.len(),
            entry_count: concept.entries.len(),
            neurons: neurons.len(),
            weights: neurons.weights(),
            density: neurons.density(),
            memory_bytes: (neurons.memory_bytes() + values.map_or(0, Values::memory_bytes)) as u64,
            role: match metadata.role {
                Role::Implant => MACULA_ROLE_IMPLANT,
                Role::Erase => MACULA_ROLE_ERASE,
            },
            scope: match metadata.scope {
                Scope::Global => MACULA_SCOPE_GLOBAL,
                Scope::Local => MACULA_SCOPE_LOCAL,
            },
            values: values_number(values.map(Values::precision)),
            reserved: 0,
            token_row_count: token.as_ref().map_or(0, |token| token.rows().len()),
        });
        Ok(())
    })
}

/// One projection of a concept, in the order of the paths' bytes.
///
/// - `subject`: a live concept; not NULL.
/// - `layer`: below `layer_count` of `macula_concept_info`.
/// - `out_info`: an initialised struct (`MACULA_LAYER_INFO_INIT`) to be filled in; not NULL.
///
/// Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_concept_get_layer(
    subject: *const macula_concept,
    layer: usize,
    out_info: *mut macula_layer_info,
) -> macula_status {
    guard("macula_concept_get_layer", |call| {
        let concept = call.object(subject, "subject")?;
        // SAFETY: valid as the header asks.
        let info = unsafe { argument::out_info(out_info, "out_info") }?;
        let (path, layer) = concept.layer(layer)?;
        info.set(macula_layer_info {
            struct_size: 0,
            path: path.as_ptr(),
            out_features: layer.out_features(),
            in_features: layer.in_features(),
            neurons: layer.indices().len(),
        });
        Ok(())
    })
}

/// Copies the indices of one projection's neurons, ascending.
///
/// - `subject`: a live concept; not NULL.
/// - `layer`: below `layer_count` of `macula_concept_info`.
/// - `out_indices`: room for `count` numbers; not NULL.
/// - `count`: must be `neurons` of `macula_layer_info`.
///
/// Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_concept_get_indices(
    subject: *const macula_concept,
    layer: usize,
    out_indices: *mut u32,
    count: usize,
) -> macula_status {
    guard("macula_concept_get_indices", |call| {
        let concept = call.object(subject, "subject")?;
        // SAFETY: valid as the header asks.
        unsafe { out(out_indices, "out_indices") }?;
        let layer = concept.layer_of(layer, count)?;
        let mut at = out_indices;
        layer.indices().for_each(|index| {
            // SAFETY: `count` numbers have room by the caller's word, and as many are visited.
            unsafe {
                at.write(index);
                at = at.add(1);
            }
        });
        Ok(())
    })
}

/// Copies what one projection's neurons become, in ascending order of their indices, in the weights' own unit.
///
/// - `subject`: a live concept; not NULL.
/// - `layer`: below `layer_count` of `macula_concept_info`.
/// - `out_values`: room for `count` numbers; not NULL.
/// - `count`: must be `neurons` of `macula_layer_info`.
///
/// Weights that the concept shuts become 0. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_concept_get_values(
    subject: *const macula_concept,
    layer: usize,
    out_values: *mut f32,
    count: usize,
) -> macula_status {
    guard("macula_concept_get_values", |call| {
        let concept = call.object(subject, "subject")?;
        // SAFETY: valid as the header asks.
        unsafe { out(out_values, "out_values") }?;
        concept.layer_of(layer, count)?;
        // SAFETY: `count` numbers have room by the caller's word, and a layer has as many values.
        unsafe {
            match &concept.concept.values {
                Some(values) => out_values.copy_from_nonoverlapping(values.layer(layer).as_ptr(), count),
                None => out_values.write_bytes(0, count),
            }
        }
        Ok(())
    })
}

/// The learnt embedding of a concept's trigger for one text encoder: the row that takes the place of the trigger's own in the
/// encoder's table while the concept is composed (textual inversion, arXiv 2208.01618).
///
/// - `subject`: a live concept; not NULL.
/// - `encoder`: below `token_row_count` of `macula_concept_info`; encoders count as the pipeline's folder does.
/// - `out_row`: receives the row `[width]`, 32-bit floating point; not NULL. Its memory belongs to the concept and must not
///   be written.
///
/// Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_concept_get_token_row(
    subject: *const macula_concept,
    encoder: usize,
    out_row: *mut macula_tensor,
) -> macula_status {
    guard("macula_concept_get_token_row", |call| {
        let concept = call.object(subject, "subject")?;
        // SAFETY: valid as the header asks.
        let out_row = unsafe { out(out_row, "out_row") }?;
        let rows = concept.concept.token.as_ref().map_or(&[][..], |token| token.rows());
        let row = rows.get(encoder).ok_or_else(|| {
            Error::invalid_argument(format!("encoder is {encoder}, but the concept has {} learnt rows", rows.len()))
        })?;
        out_row.set(macula_tensor::view(row, &[row.len()], MACULA_DTYPE_F32));
        Ok(())
    })
}

/// One entry of a concept's metadata, as it stands in the file, in the order of the keys' bytes.
///
/// - `subject`: a live concept; not NULL.
/// - `entry`: below `entry_count` of `macula_concept_info`.
/// - `out_key`: receives the key, e.g. `"modelspec.title"`; not NULL. The text belongs to the concept.
/// - `out_value`: receives the value; not NULL. The text belongs to the concept.
///
/// Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_concept_get_entry(
    subject: *const macula_concept,
    entry: usize,
    out_key: *mut *const c_char,
    out_value: *mut *const c_char,
) -> macula_status {
    guard("macula_concept_get_entry", |call| {
        let concept = call.object(subject, "subject")?;
        // SAFETY: valid as the header asks.
        let (out_key, out_value) = unsafe { (out(out_key, "out_key")?, out(out_value, "out_value")?) };
        let (key, value) = concept.entries.get(entry).ok_or_else(|| {
            Error::invalid_argument(format!("entry is {entry}, but the concept has {}", concept.entries.len()))
        })?;
        out_key.set(key.as_ptr());
        out_value.set(value.as_ptr());
        Ok(())
    })
}

/// One value of a concept's metadata by its key.
///
/// - `subject`: a live concept; not NULL.
/// - `key`: e.g. `"macula.trigger"` or `"modelspec.title"`; not NULL.
/// - `out_value`: receives the value; not NULL. The text belongs to the concept.
///
/// Errors: `NOT_FOUND` if there is no such key. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_concept_get_metadata(
    subject: *const macula_concept,
    key: *const c_char,
    out_value: *mut *const c_char,
) -> macula_status {
    guard("macula_concept_get_metadata", |call| {
        let concept = call.object(subject, "subject")?;
        // SAFETY: valid as the header asks.
        let (key, out_value) = unsafe { (text(key, "key")?, out(out_value, "out_value")?) };
        let (_, value) = concept
            .entries
            .iter()
            .find(|(name, _)| name.to_bytes() == key.as_bytes())
            .ok_or_else(|| Error::not_found(format!("the concept's metadata has no {key:?}")))?;
        out_value.set(value.as_ptr());
        Ok(())
    })
}

/// The weights of either concept. The result carries the first one's metadata, with a method that names the operation.
/// Concepts with tuned values or a learnt embedding are refused: compose them instead.
///
/// - `first`: a live concept; not NULL.
/// - `second`: a live concept of the same base model; not NULL.
/// - `out_concept`: receives the result; not NULL. Free it with `macula_concept_free`.
///
/// Errors: `WRONG_BASE` with both fingerprints; `INVALID_ARGUMENT` for tuned values or a learnt embedding. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_concept_union(
    first: *const macula_concept,
    second: *const macula_concept,
    out_concept: *mut *mut macula_concept,
) -> macula_status {
    combine("macula_concept_union", first, second, out_concept, "union", NeuronSet::union)
}

/// The weights of both concepts. Otherwise as `macula_concept_union`.
///
/// - `first`: a live concept; not NULL.
/// - `second`: a live concept of the same base model; not NULL.
/// - `out_concept`: receives the result; not NULL. Free it with `macula_concept_free`.
///
/// Errors: `WRONG_BASE` with both fingerprints. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_concept_intersection(
    first: *const macula_concept,
    second: *const macula_concept,
    out_concept: *mut *mut macula_concept,
) -> macula_status {
    combine("macula_concept_intersection", first, second, out_concept, "intersection", NeuronSet::intersection)
}

/// The weights of the first concept that are not the second's. Otherwise as `macula_concept_union`.
///
/// - `first`: a live concept; not NULL.
/// - `second`: a live concept of the same base model; not NULL.
/// - `out_concept`: receives the result; not NULL. Free it with `macula_concept_free`.
///
/// Errors: `WRONG_BASE` with both fingerprints. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_concept_difference(
    first: *const macula_concept,
    second: *const macula_concept,
    out_concept: *mut *mut macula_concept,
) -> macula_status {
    combine("macula_concept_difference", first, second, out_concept, "difference", NeuronSet::difference)
}

fn combine(
    name: &'static str,
    first: *const macula_concept,
    second: *const macula_concept,
    out_concept: *mut *mut macula_concept,
    method: &str,
    operation: fn(&NeuronSet, &NeuronSet) -> Result<NeuronSet>,
) -> macula_status {
    guard(name, |call| {
        let (first, second) = (call.object(first, "first")?, call.object(second, "second")?);
        // SAFETY: valid as the header asks.
        let out_concept = unsafe { out(out_concept, "out_concept") }?;
        same_base(&first.concept, &second.concept)?;
        for Concept { metadata, values, token, .. } in [&first.concept, &second.concept] {
            let lost = match (values, token) {
                (Some(_), _) => "tuned values",
                (None, Some(_)) => "a learnt embedding",
                (None, None) => continue,
            };
            return Err(Error::invalid_argument(format!(
                "{:?} has {lost}, which a {method} of sets would lose: compose the concepts instead",
                metadata.title
            )));
        }
        let neurons = operation(&first.concept.neurons, &second.concept.neurons)?;
        let mut metadata = first.concept.metadata.clone();
        metadata.method = format!("{method} of {:?} and {:?}", metadata.title, second.concept.metadata.title);
        out_concept.set(macula_concept::table().insert(macula_concept::new(Concept {
            metadata,
            neurons,
            values: None,
            token: None,
        })));
        Ok(())
    })
}

fn same_base(first: &Concept, second: &Concept) -> Result<()> {
    let (first, second) = (first.metadata.base, second.metadata.base);
    if first == second {
        return Ok(());
    }
    Err(Error::new(Status::WrongBase, format!("the concepts are of two base models, {first} and {second}")))
}

/// What two concepts have in common.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_overlap {
    /// Weights of both.
    pub intersection_count: u64,
    /// Weights of either.
    pub union_count: u64,
    /// `intersection_count / union_count`, the Jaccard index, in 0 to 1; 0 for two empty sets.
    pub jaccard: f64,
}

/// How far two concepts overlap, in all and in each projection. Nothing is built, so it is fast at any size.
///
/// - `first`: a live concept; not NULL.
/// - `second`: a live concept of the same base model; not NULL.
/// - `out_total`: receives the overlap of the whole sets; not NULL.
/// - `out_layers`: receives the overlap of each projection, in the order of the paths' bytes; may be NULL.
/// - `layer_count`: room of `out_layers`; if that is not NULL, it must be the number of projections that either lists,
///   which is `layer_count` of `macula_concept_info` for two concepts that list the same ones.
///
/// Errors: `WRONG_BASE` with both fingerprints. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_concept_overlap(
    first: *const macula_concept,
    second: *const macula_concept,
    out_total: *mut macula_overlap,
    out_layers: *mut macula_overlap,
    layer_count: usize,
) -> macula_status {
    guard("macula_concept_overlap", |call| {
        let (first, second) = (call.object(first, "first")?, call.object(second, "second")?);
        // SAFETY: valid as the header asks.
        let out_total = unsafe { out(out_total, "out_total") }?;
        same_base(&first.concept, &second.concept)?;
        let overlap = first.concept.neurons.overlap(&second.concept.neurons)?;
        let c = |shared: &crate::concept::Shared| macula_overlap {
            intersection_count: shared.intersection,
            union_count: shared.union,
            jaccard: shared.jaccard(),
        };
        if !out_layers.is_null() {
            if layer_count != overlap.layers.len() {
                return Err(Error::invalid_argument(format!(
                    "layer_count is {layer_count}, but the concepts list {} projections",
                    overlap.layers.len()
                )));
            }
            for (at, (_, shared)) in overlap.layers.iter().enumerate() {
                // SAFETY: `layer_count` structs have room by the caller's word.
                unsafe { out(out_layers.add(at), "out_layers") }?.set(c(shared));
            }
        }
        out_total.set(c(&overlap.total));
        Ok(())
    })
}
