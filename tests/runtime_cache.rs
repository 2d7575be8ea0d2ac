//! The cache of optimised graphs: same bits, quick to load, made anew when anything about it is wrong.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use macula::onnx::{Limits, Model};
use macula::progress::CancelToken;
use macula::runtime::{Optimization, Runtime, RuntimeOptions, Session, SessionOptions, Tensor};

mod small_models;
use small_models::convolutions;

fn runtime() -> Runtime {
    Runtime::load(&RuntimeOptions::default()).expect("set MACULA_ONNXRUNTIME to ONNX Runtime's library")
}

fn options(cache: Option<&Path>) -> SessionOptions {
    let mut options = SessionOptions::default();
    options.intra_threads = 1;
    options.cache = cache.map(Path::to_path_buf);
    options
}

/// A model in a folder, with its weights in an external file.
fn saved(folder: &Path) -> PathBuf {
    let path = folder.join("model.onnx");
    let (model, weights) = convolutions(Some("model.onnx_data"));
    fs::write(folder.join("model.onnx_data"), weights).unwrap();
    fs::write(&path, model).unwrap();
    path
}

fn open(path: &Path) -> Model {
    Model::open(path, &Limits::default()).unwrap()
}

fn run(session: &Session) -> Vec<f32> {
    let x = Tensor::from_vec(&[1, 16, 12, 12], (0..16 * 144).map(|i| (i as f32 * 0.37).sin()).collect()).unwrap();
    session.run(&[("x", &x)], &[], &CancelToken::new()).unwrap().remove(0).into_vec().unwrap()
}

fn entries(cache: &Path) -> Vec<PathBuf> {
    let mut names: Vec<_> = fs::read_dir(cache).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    names
}

#[test]
fn a_cached_session_gives_the_same_bits() {
    let (folder, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let model = open(&saved(folder.path()));
    let plain = run(&runtime().session(&model, &options(None)).unwrap());
    for round in 0..3 {
        let session = runtime().session(&model, &options(Some(cache.path()))).unwrap();
        assert_eq!(run(&session), plain, "round {round}");
        assert_eq!(session.memory().weights, 2 * 16 * 16 * 9 * 4);
        assert_eq!(entries(cache.path()).len(), 1);
    }
    let graph = open(&entries(cache.path())[0].join("model.onnx"));
    assert!(graph.external_files().count() > 0, "weights are kept beside the graph");
}

#[test]
fn whatever_decides_the_graph_has_an_entry_of_its_own() {
    let (folder, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = saved(folder.path());
    let count = |options: &SessionOptions| {
        runtime().session(&open(&path), options).unwrap();
        entries(cache.path()).len()
    };
    let mut other = options(Some(cache.path()));
    assert_eq!(count(&other), 1);
    other.intra_threads = 2;
    assert_eq!(count(&other), 1, "threads do not change the graph");
    other.optimization = Optimization::Basic;
    assert_eq!(count(&other), 2);
    let weights = folder.path().join("model.onnx_data");
    let mut changed = fs::read(&weights).unwrap();
    changed[3] ^= 0x80;
    fs::write(&weights, changed).unwrap();
    assert_eq!(count(&other), 3, "external weights changed");
}

#[test]
fn a_damaged_entry_is_made_anew() {
    let (folder, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let model = open(&saved(folder.path()));
    let plain = run(&runtime().session(&model, &options(None)).unwrap());
    let session = || runtime().session(&model, &options(Some(cache.path()))).unwrap();
    assert_eq!(run(&session()), plain);
    let entry = entries(cache.path()).remove(0);
    let change = |name: &str, change: fn(Vec<u8>) -> Vec<u8>| {
        let path = entry.join(name);
        let times = fs::metadata(&path).unwrap().modified().unwrap();
        fs::write(&path, change(fs::read(&path).unwrap())).unwrap();
        // A writer that hides its traces is noticed too.
        fs::File::options().write(true).open(&path).unwrap().set_modified(times).unwrap();
    };
    type Damage<'a> = (&'a str, Box<dyn Fn() + 'a>);
    let mut damages: Vec<Damage> = Vec::new();
    for name in ["model.onnx", "weights.bin", "manifest.json"] {
        damages.push((name, Box::new(move || change(name, |bytes| bytes[..bytes.len() / 2].to_vec()))));
        damages.push((name, Box::new(move || change(name, |_| Vec::new()))));
        let entry = &entry;
        damages.push((name, Box::new(move || fs::remove_file(entry.join(name)).unwrap())));
    }
    for name in ["model.onnx", "weights.bin"] {
        let flip = |mut bytes: Vec<u8>| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x40;
            bytes
        };
        damages.push((name, Box::new(move || change(name, flip))));
    }
    for (name, damage) in damages {
        damage();
        assert_eq!(run(&session()), plain, "after damage to {name}");
        assert_eq!(entries(cache.path()).as_slice(), std::slice::from_ref(&entry), "after damage to {name}");
        assert!(fs::metadata(entry.join("weights.bin")).unwrap().len() >= 2 * 16 * 16 * 9 * 4);
    }
}

#[test]
fn a_cache_that_can_not_be_written_is_no_reason_to_fail() {
    let folder = tempfile::tempdir().unwrap();
    let model = open(&saved(folder.path()));
    let file = folder.path().join("not a folder");
    fs::write(&file, "").unwrap();
    run(&runtime().session(&model, &options(Some(&file))).unwrap());
    run(&runtime().session(&model, &options(Some(Path::new("/proc/nowhere")))).unwrap());
}

#[test]
fn eight_writers_leave_one_sound_entry() {
    let (folder, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let model = Arc::new(open(&saved(folder.path())));
    let plain = run(&runtime().session(&model, &options(None)).unwrap());
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..3 {
                    assert_eq!(run(&runtime().session(&model, &options(Some(cache.path()))).unwrap()), plain);
                }
            });
        }
    });
    assert_eq!(entries(cache.path()).len(), 1);
}

#[test]
fn the_limit_removes_what_was_not_used_for_longest() {
    let (folder, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let model = open(&saved(folder.path()));
    let mut options = options(Some(cache.path()));
    let mut made = Vec::new();
    for optimization in [Optimization::Off, Optimization::Basic, Optimization::Extended] {
        options.optimization = optimization;
        options.cache_limit = 45_000;
        runtime().session(&model, &options).unwrap();
        made.extend(entries(cache.path()).into_iter().filter(|entry| !made.contains(entry)).collect::<Vec<_>>());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert_eq!(made.len(), 3);
    let left = entries(cache.path());
    assert!(!left.contains(&made[0]) && left.contains(&made[2]), "{left:?} of {made:?}");
}
