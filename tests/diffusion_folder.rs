//! Model folders that are not what they should be: each fault is an error that names the file and what was expected,
//! and leaves a process in which the sound folder still opens.

mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use macula::Status;
use macula::diffusion::pipeline::{DrawOptions, Pipeline};
use macula::diffusion::schedule::Sampler;
use macula::diffusion::unet::UnetOptions;
use macula::progress::Job;
use macula::runtime::{Runtime, RuntimeOptions};
use serde_json::{Value, json};

fn runtime() -> Runtime {
    support::onnxruntime();
    Runtime::load(&RuntimeOptions::default()).unwrap()
}

/// A copy of a sound folder, to be damaged. Its files are links to the originals until they are changed.
struct Copy {
    place: tempfile::TempDir,
}

impl Copy {
    fn new() -> Self {
        let copy = Self { place: tempfile::tempdir().unwrap() };
        link(&support::fixture("pipelines.py", &["sd1"]).join("model"), &copy.path());
        copy
    }

    fn path(&self) -> PathBuf {
        self.place.path().join("model")
    }

    /// Puts `bytes` in the place of a file.
    fn put(&self, file: &str, bytes: &[u8]) {
        let path = self.path().join(file);
        let _ = fs::remove_file(&path);
        fs::write(path, bytes).unwrap();
    }

    fn remove(&self, name: &str) {
        let path = self.path().join(name);
        if path.is_dir() { fs::remove_dir_all(path).unwrap() } else { fs::remove_file(path).unwrap() }
    }

    /// Puts a link in the place of a file or folder.
    fn put_link(&self, name: &str, target: impl AsRef<Path>) {
        self.remove(name);
        symlink(target, self.path().join(name)).unwrap();
    }

    fn json(&self, file: &str) -> Value {
        serde_json::from_slice(&fs::read(self.path().join(file)).unwrap()).unwrap()
    }

    /// Sets a field of a JSON file.
    fn set(&self, file: &str, field: &str, value: Value) {
        let mut object = self.json(file);
        object[field] = value;
        self.put(file, object.to_string().as_bytes());
    }

    fn open(&self) -> macula::Result<Pipeline> {
        Pipeline::open(&runtime(), self.path(), &UnetOptions::default())
    }
}

fn link(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() { link(&path, &target) } else { symlink(&path, &target).unwrap() }
    }
}

/// Damages a fresh copy; opening it must fail with that status and all of the words.
fn refused(damage: impl FnOnce(&Copy), status: Status, words: &[&str]) {
    let copy = Copy::new();
    damage(&copy);
    let error = copy.open().err().unwrap_or_else(|| panic!("opened; expected {words:?}"));
    assert_eq!(error.status(), status, "{error}");
    words.iter().for_each(|word| assert!(error.message().contains(word), "no {word:?} in: {error}"));
}

const MODELS: [&str; 4] =
    ["unet/model.onnx", "text_encoder/model.onnx", "vae_decoder/model.onnx", "vae_encoder/model.onnx"];
const OBJECTS: [&str; 5] = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    "unet/config.json",
    "vae_decoder/config.json",
];

#[test]
fn what_is_missing_is_named() {
    for name in ["model_index.json", "scheduler/scheduler_config.json", "scheduler", "unet", "tokenizer"] {
        refused(|copy| copy.remove(name), Status::NotFound, &[name]);
    }
    for name in MODELS {
        refused(|copy| copy.remove(name), Status::NotFound, &[name]);
    }
    refused(|copy| copy.remove("vae_decoder"), Status::NotFound, &["vae_decoder", "4 channels"]);
    let files = |copy: &Copy| {
        for name in ["tokenizer.json", "vocab.json", "merges.txt"] {
            let _ = fs::remove_file(copy.path().join("tokenizer").join(name));
        }
    };
    refused(files, Status::NotFound, &["tokenizer", "vocab.json", "merges.txt"]);
    let nowhere = Path::new("/nowhere/model");
    let error = Pipeline::open(&runtime(), nowhere, &UnetOptions::default()).err().unwrap();
    assert!(error.status() == Status::NotFound && error.message().contains("/nowhere/model"), "{error}");
    let file = Copy::new().path().join("model_index.json");
    let error = Pipeline::open(&runtime(), file, &UnetOptions::default()).err().unwrap();
    assert!(error.message().contains("model_index.json"), "{error}");
}

#[test]
fn damaged_models_are_named() {
    for name in MODELS {
        refused(|copy| copy.put(name, b""), Status::InvalidFile, &[name]);
        refused(|copy| copy.put(name, b"<html>404</html>"), Status::InvalidFile, &[name]);
        let half = |copy: &Copy| {
            let bytes = fs::read(copy.path().join(name)).unwrap();
            copy.put(name, &bytes[..bytes.len() / 2]);
        };
        refused(half, Status::InvalidFile, &[name]);
        // What a checkout without Git LFS leaves.
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3438167534\n";
        refused(|copy| copy.put(name, pointer), Status::InvalidFile, &[name]);
    }
    // A model of another part.
    let swapped = |copy: &Copy| copy.put_link("unet/model.onnx", copy.path().join("vae_decoder/model.onnx"));
    refused(swapped, Status::Unsupported, &["unet/model.onnx", "latent_sample", "encoder_hidden_states"]);
    let swapped = |copy: &Copy| copy.put_link("text_encoder/model.onnx", copy.path().join("unet/model.onnx"));
    refused(swapped, Status::Unsupported, &["text_encoder/model.onnx", "input_ids"]);
    let swapped = |copy: &Copy| copy.put_link("vae_decoder/model.onnx", copy.path().join("unet/model.onnx"));
    refused(swapped, Status::Unsupported, &["vae_decoder/model.onnx", "timestep"]);
}

#[test]
fn damaged_texts_are_named() {
    for name in OBJECTS {
        for text in ["", "{", "not json", "{\"a\": 1}}", "\u{feff}{}"] {
            refused(|copy| copy.put(name, text.as_bytes()), Status::InvalidFile, &[name, "not JSON"]);
        }
        for text in ["null", "[]", "7", "\"text\""] {
            refused(|copy| copy.put(name, text.as_bytes()), Status::InvalidFile, &[name, "not a JSON object"]);
        }
        let deep = "[".repeat(100_000);
        refused(|copy| copy.put(name, deep.as_bytes()), Status::InvalidFile, &[name, "not JSON"]);
        refused(|copy| copy.put(name, &[0xff, 0xfe, b'{', b'}']), Status::InvalidFile, &[name, "not JSON"]);
        let huge = " ".repeat(17 << 20);
        refused(|copy| copy.put(name, huge.as_bytes()), Status::LimitExceeded, &[name]);
    }
    refused(|copy| copy.put("tokenizer/tokenizer.json", b"{}"), Status::InvalidFile, &["tokenizer.json"]);
    let vocabulary = |text: &'static [u8]| {
        move |copy: &Copy| {
            let _ = fs::remove_file(copy.path().join("tokenizer/tokenizer.json"));
            copy.put("tokenizer/vocab.json", text);
            copy.put("tokenizer/merges.txt", b"#version: 0.2\n");
        }
    };
    for (text, word) in [(&b"[]"[..], "not a JSON object"), (b"{\"a\": \"b\"}", "<|startoftext|>"), (b"{", "not JSON")]
    {
        refused(vocabulary(text), Status::InvalidFile, &["vocab.json", word]);
    }
}

#[test]
fn fields_of_a_wrong_kind_are_named_with_their_value() {
    for (file, field, value, status) in [
        ("unet/config.json", "sample_size", json!("64"), Status::InvalidFile),
        ("unet/config.json", "sample_size", json!(-8), Status::InvalidFile),
        ("unet/config.json", "sample_size", json!(1e30), Status::InvalidFile),
        ("unet/config.json", "sample_size", json!([8, 0]), Status::InvalidFile),
        ("unet/config.json", "down_block_types", json!([]), Status::InvalidFile),
        ("unet/config.json", "pixel_unshuffle", json!(1_u64 << 40), Status::InvalidFile),
        ("vae_decoder/config.json", "scaling_factor", json!("0.18"), Status::InvalidFile),
        ("vae_decoder/config.json", "scaling_factor", json!(0.0), Status::InvalidFile),
        ("vae_decoder/config.json", "shift_factor", json!([1]), Status::InvalidFile),
        ("vae_decoder/config.json", "latents_mean", json!([0, "a"]), Status::InvalidFile),
        ("vae_decoder/config.json", "latents_std", json!(1.5), Status::InvalidFile),
        ("vae_decoder/config.json", "block_out_channels", json!([]), Status::InvalidFile),
        ("tokenizer/tokenizer_config.json", "pad_token", json!("<nowhere>"), Status::InvalidFile),
    ] {
        let name = file.split('/').next().unwrap();
        refused(|copy| copy.set(file, field, value.clone()), status, &[name, field]);
    }
}

#[test]
fn a_scheduler_that_is_not_handled_is_named_and_can_be_replaced() {
    for (field, value, status, words) in [
        (
            "_class_name",
            json!("HeunDiscreteScheduler"),
            Status::Unsupported,
            &["HeunDiscreteScheduler", "DDIMScheduler"],
        ),
        ("_class_name", json!(7), Status::InvalidFile, &["_class_name", "7"]),
        ("beta_schedule", json!("cubic"), Status::Unsupported, &["beta_schedule", "cubic"]),
        ("num_train_timesteps", json!("1000"), Status::InvalidFile, &["num_train_timesteps", "1000"]),
        ("num_train_timesteps", json!(1_u64 << 50), Status::InvalidFile, &["num_train_timesteps", "100000"]),
        ("beta_end", json!(-1), Status::InvalidFile, &["beta_end", "-1"]),
        ("prediction_type", json!("flow"), Status::Unsupported, &["prediction_type", "flow"]),
    ] {
        let copy = Copy::new();
        copy.set("scheduler/scheduler_config.json", field, value);
        // A host may bring a sampler of its own, or none at all: the folder opens.
        let mut pipeline = copy.open().unwrap();
        let mut draw = DrawOptions::new("a red cat");
        draw.steps = 1;
        let error = pipeline.draw(&draw, None, &mut Job::default()).unwrap_err();
        assert_eq!(error.status(), status, "{error}");
        assert!(error.message().contains("scheduler/scheduler_config.json"), "{error}");
        words.iter().for_each(|word| assert!(error.message().contains(word), "no {word:?} in: {error}"));
        if field == "_class_name" {
            draw.sampler = Some(Sampler::Ddim);
            pipeline.draw(&draw, None, &mut Job::default()).unwrap();
        }
    }
}

#[test]
fn links_that_lead_nowhere_or_in_circles_are_named_and_pipes_are_not_read() {
    for name in ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "unet/model.onnx"] {
        let circle = |copy: &Copy| copy.put_link(name, Path::new(name).file_name().unwrap());
        refused(circle, Status::Io, &[name]);
        let pipe = |copy: &Copy| {
            copy.remove(name);
            assert!(Command::new("mkfifo").arg(copy.path().join(name)).status().unwrap().success());
        };
        refused(pipe, Status::InvalidFile, &[name, "regular file"]);
        let folder = |copy: &Copy| {
            copy.remove(name);
            fs::create_dir(copy.path().join(name)).unwrap();
        };
        refused(folder, Status::InvalidFile, &[name, "regular file"]);
        let device = |copy: &Copy| copy.put_link(name, "/dev/zero");
        refused(device, Status::InvalidFile, &[name, "regular file"]);
    }
    for name in ["scheduler", "unet", "text_encoder", "vae_decoder"] {
        refused(|copy| copy.put_link(name, "nowhere"), Status::NotFound, &[name]);
        refused(|copy| copy.put_link(name, name), Status::Io, &[name]);
        refused(|copy| copy.put_link(name, "model_index.json"), Status::InvalidFile, &[name, "folder"]);
    }
    // A folder that holds itself is not walked.
    let copy = Copy::new();
    symlink(copy.path(), copy.path().join("safety_checker")).unwrap();
    symlink("..", copy.path().join("unet/unet")).unwrap();
    copy.open().unwrap();
    // Folders and files that are links to sound ones are what a Hugging Face cache consists of.
    let elsewhere = Copy::new();
    let copy = Copy::new();
    copy.put_link("unet", elsewhere.path().join("unet"));
    copy.open().unwrap();
}
