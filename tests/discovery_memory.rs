//! A discovery that runs out of memory says so: under limits on its address space, each in a process of its own, it ends
//! with a status; pictures are drawn as before, and its checkpoint leads to what it would have found. Long; under
//! `MACULA_FULL_TESTS`.

mod support;

use std::path::Path;
use std::process::Command;

use macula::concept::{Concept, Precision};
use macula::diffusion::pipeline::{DrawOptions, Images, Pipeline};
use macula::diffusion::unet::UnetOptions;
use macula::discovery::search::Method;
use macula::discovery::{Goal, Request, Subject, TuneOptions};
use macula::progress::Job;
use macula::runtime::{Runtime, RuntimeOptions};
use macula::{Result, Status};
use sha2::{Digest, Sha256};

const PIPELINE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/emoji/onnx");
const PICTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/emoji/subjects/octopus/1.png");
/// The shipped model's class of plain pictures of 32 pixels.
const SMALL: i64 = 4;

/// Bytes of address space that the child may add while it searches; unset for any number.
const ROOM: &str = "MACULA_TEST_ROOM";
/// The child's folder.
const FOLDER: &str = "MACULA_TEST_FOLDER";

fn bytes(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

fn limit(bytes: u64) {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: `limit` is a valid struct that outlives the call.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &limit) }, 0);
}

fn find(pipeline: &mut Pipeline, pictures: &Images, checkpoint: &Path) -> Result<Concept> {
    let mut request = Request::new(Goal::Implant(Subject {
        pictures,
        prompts: Vec::new(),
        trigger: "<s2>".into(),
        class_noun: "animal".into(),
        class_pictures: None,
    }));
    (request.batches, request.batch, request.class_label) = (2, 1, SMALL);
    request.method = Method::Gradual { stages: 2 };
    // Two steps: the second sees values among their levels.
    let precision = Precision::Quaternary;
    request.tune = Some(TuneOptions { steps: 2, precision, ..TuneOptions::default() });
    request.checkpoint = Some(checkpoint.into());
    Ok(request.find(pipeline, &mut Job::default())?.0)
}

/// Searches within its room, then without a limit; says how the first ended, how much it added, and what the second found.
#[test]
#[ignore = "the child of the other test, in a process of its own"]
fn child_process() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    let kept = Path::new(&folder).join("kept");
    support::onnxruntime();
    let mut options = UnetOptions::default();
    (options.threads, options.session.intra_threads) = (2, 2);
    let runtime = Runtime::load(&RuntimeOptions::default()).unwrap();
    let mut pipeline = Pipeline::open(&runtime, PIPELINE, &options).unwrap();
    let mut draw = DrawOptions::new("a <s2> animal on a blue background");
    (draw.width, draw.height, draw.steps, draw.class_label) = (Some(32), Some(32), 1, SMALL);
    let before = pipeline.draw(&draw, None, &mut Job::default()).unwrap();
    let pictures = Images::read(PICTURE, 32, 32).unwrap();

    let start = bytes("VmSize");
    if let Ok(room) = std::env::var(ROOM) {
        limit(start + room.parse::<u64>().unwrap());
    }
    let outcome = find(&mut pipeline, &pictures, &kept);
    limit(libc::RLIM_INFINITY);
    let ended = match &outcome {
        Ok(_) => "found".to_owned(),
        Err(error) if error.status() == Status::OutOfMemory => format!("out of memory: {error}"),
        Err(error) => panic!("{:?}: {error}", error.status()),
    };
    println!("\nended {}", ended.replace('\n', " "));
    println!("added {}", bytes("VmPeak") - start);
    assert!(pipeline.draw(&draw, None, &mut Job::default()).unwrap() == before, "it draws another picture");
    let found = find(&mut pipeline, &pictures, &kept).unwrap();
    let found = found.to_bytes().unwrap();
    if let Ok(first) = outcome {
        assert_eq!(first.to_bytes().unwrap(), found);
    }
    println!("hash {}", Sha256::digest(&found).iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    let files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(files, ["kept"]);
}

/// What a child said of how it ended, how much it added, and what it found.
fn child(room: Option<u64>) -> (String, u64, String) {
    let folder = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "child_process", "--ignored", "--nocapture", "--test-threads=1"]);
    child.env(FOLDER, folder.path()).env_remove(ROOM);
    if let Some(room) = room {
        child.env(ROOM, room.to_string());
    }
    let output = child.output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "room for {room:?} bytes: {}\n{out}\n{err}", output.status);
    let said = |what: &str| {
        let line = out.lines().find_map(|line| line.strip_prefix(what));
        line.unwrap_or_else(|| panic!("it did not run: {out}")).trim().to_owned()
    };
    (said("ended"), said("added").parse().unwrap(), said("hash"))
}

#[test]
fn a_search_without_enough_memory_ends_with_a_status() {
    if std::env::var_os("MACULA_FULL_TESTS").is_none_or(|value| value != "1") {
        return;
    }
    let parts = 60;
    let (ended, added, expected) = child(None);
    assert_eq!(ended, "found");
    let mut refused = 0;
    for part in 0..parts {
        let room = added * part / parts;
        let (ended, _, found) = child(Some(room));
        println!("{} of {} MiB: {ended}", room >> 20, added >> 20);
        assert_eq!(found, expected);
        refused += u64::from(ended != "found");
    }
    assert!(refused > 1 && refused >= parts / 2, "only {refused} of {parts} limits were too small");
}
