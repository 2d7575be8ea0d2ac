//! Concepts tuned together on the shipped model, from scenes of their subjects.

mod support;

use std::ops::ControlFlow;

use macula::Status;
use macula::concept::{Concept, Precision, Role, Scope};
use macula::diffusion::pipeline::{Images, Pipeline};
use macula::diffusion::unet::UnetOptions;
use macula::discovery::search::Method;
use macula::discovery::{Companion, Goal, InvertOptions, Request, Subject, Together, TuneOptions};
use macula::progress::{CancelToken, Job, Progress};
use macula::runtime::{Runtime, RuntimeOptions};

const MODELS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/emoji");
/// The shipped model's class of plain pictures of 32 pixels.
const SMALL: i64 = 4;
const SUBJECTS: [(&str, &str, &str); 3] =
    [("octopus", "<s1>", "animal"), ("green-apple", "<s2>", "apple"), ("tractor", "<s3>", "vehicle")];

fn pipeline(threads: usize) -> Pipeline {
    support::onnxruntime();
    let runtime = Runtime::load(&RuntimeOptions::default()).unwrap();
    let mut options = UnetOptions::default();
    (options.threads, options.session.intra_threads) = (threads, threads);
    Pipeline::open(&runtime, format!("{MODELS}/onnx"), &options).unwrap()
}

fn pictures(name: &str) -> Images {
    let read = |number| Images::read(format!("{MODELS}/subjects/{name}/{number}.png"), 32, 32).unwrap();
    let mut pictures = read(1);
    pictures.rgb.extend(read(2).rgb);
    Images { count: 2, ..pictures }
}

/// A set of little meaning, found in a moment; the first one with a learnt word, the last one shut.
fn found(pipeline: &mut Pipeline, number: usize, pictures: &Images) -> Concept {
    let (_, trigger, class_noun) = SUBJECTS[number];
    let mut request = Request::new(Goal::Implant(Subject {
        pictures,
        prompts: Vec::new(),
        trigger: trigger.into(),
        class_noun: class_noun.into(),
        class_pictures: None,
    }));
    (request.batches, request.batch, request.class_label) = (4, 2, SMALL);
    request.method = Method::Algorithm1 { rho: 0.0 };
    request.density = Some(0.01);
    request.invert = (number == 0).then(|| InvertOptions { steps: 2, ..InvertOptions::default() });
    request.tune = (number < 2).then(|| TuneOptions { steps: 4, ..TuneOptions::default() });
    request.find(pipeline, &mut Job::default()).unwrap().0
}

struct Given {
    pictures: Vec<Images>,
    concepts: Vec<Concept>,
}

impl Given {
    fn new(pipeline: &mut Pipeline) -> Self {
        let pictures: Vec<Images> = SUBJECTS.iter().map(|(name, ..)| pictures(name)).collect();
        let concepts =
            pictures.iter().enumerate().map(|(number, pictures)| found(pipeline, number, pictures)).collect();
        Self { pictures, concepts }
    }

    fn together(&self) -> Together<'_> {
        let each = self.concepts.iter().zip(&self.pictures);
        let mut together = Together::new(
            each.map(|(concept, pictures)| Companion { concept, pictures, prompts: Vec::new() }).collect(),
        );
        (together.scenes, together.batch, together.class_label) = (12, 4, SMALL);
        together.tune.steps = 48;
        together
    }
}

fn mean(losses: &[f64]) -> f64 {
    losses.iter().sum::<f64>() / losses.len() as f64
}

/// Breaking off is a cancel at a step; the other part runs with more threads.
#[test]
fn the_loss_falls_and_a_tuning_that_was_broken_off_ends_as_in_one_go() {
    let mut one = pipeline(1);
    let given = Given::new(&mut one);
    let mut together = given.together();
    let (whole, losses) = together.tune(&mut one, &mut Job::default()).unwrap();
    assert_eq!((whole.len(), losses.len()), (3, 48));
    // The same batches at the values that it begins with.
    let still = TuneOptions { rate: 1e-9, ..together.tune };
    let (_, before) = Together { tune: still, ..together.clone() }.tune(&mut one, &mut Job::default()).unwrap();
    assert_eq!(losses[0], before[0]);
    let fallen = mean(&losses[24..]) / mean(&before[24..]);
    assert!(fallen < 0.97, "{fallen}");
    for (tuned, before) in whole.iter().zip(&given.concepts) {
        assert_eq!((&tuned.neurons, &tuned.token), (&before.neurons, &before.token));
        assert_ne!(tuned.values, before.values);
        assert_eq!(tuned.values.as_ref().unwrap().precision(), Precision::F16);
        assert!(tuned.metadata.method.ends_with("48 steps of tuning with 2 others"), "{}", tuned.metadata.method);
        assert_eq!(&Concept::from_bytes(&tuned.to_bytes().unwrap()).unwrap().values, &tuned.values);
    }

    let folder = tempfile::tempdir().unwrap();
    together.checkpoint = Some(folder.path().join("kept"));
    let mut stop = |progress: Progress<'_>| match (progress.stage, progress.done) {
        ("tune", 13) => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    let mut job = Job { cancel: CancelToken::new(), report: Some(&mut stop) };
    assert_eq!(together.tune(&mut one, &mut job).unwrap_err().status(), Status::Cancelled);
    let mut told = Vec::new();
    let mut watch = |progress: Progress<'_>| {
        told.extend((progress.stage == "tune").then_some(progress.done));
        ControlFlow::Continue(())
    };
    let mut job = Job { cancel: CancelToken::new(), report: Some(&mut watch) };
    let (resumed, again) = together.tune(&mut pipeline(2), &mut job).unwrap();
    assert_eq!(told, (13..=48).collect::<Vec<_>>());
    assert_eq!(again[..13], losses[..13]);
    let close = |a: &Concept, b: &Concept| {
        let of = |concept: &Concept| {
            let layers = concept.neurons.layers().len();
            (0..layers).flat_map(|at| concept.values.as_ref().unwrap().layer(at).to_vec()).collect::<Vec<f32>>()
        };
        of(a).iter().zip(of(b)).all(|(a, b)| (a - b).abs() <= 2e-3)
    };
    assert!(resumed.iter().zip(&whole).all(|(a, b)| close(a, b)));
    // What has ended is made again without a step; another tuning does not go on from it.
    assert_eq!(together.tune(&mut one, &mut Job::default()).unwrap().1, again);
    together.seed = 1;
    let error = together.tune(&mut one, &mut Job::default()).unwrap_err();
    assert!(error.status() == Status::InvalidArgument && error.message().contains("kept"), "{error}");
}

#[test]
fn what_can_not_be_tuned_together_is_refused() {
    let mut pipeline = pipeline(1);
    let given = Given::new(&mut pipeline);
    let larger = Images::read(format!("{MODELS}/subjects/octopus/1.png"), 64, 64).unwrap();
    let changed = |change: &dyn Fn(&mut Concept)| {
        let mut concept = given.concepts[1].clone();
        change(&mut concept);
        concept
    };
    let erasing = changed(&|concept| concept.metadata.role = Role::Erase);
    let global = changed(&|concept| concept.metadata.scope = Scope::Global);
    let twin = changed(&|concept| concept.metadata.trigger = "<s1>".into());
    let unheard = changed(&|concept| concept.metadata.trigger = "unheard-of".into());
    let mut refused = |change: &dyn Fn(&mut Together<'_>), part: &str| {
        let mut together = given.together();
        change(&mut together);
        let error = together.tune(&mut pipeline, &mut Job::default()).unwrap_err();
        assert_eq!(error.status(), Status::InvalidArgument, "{error}");
        assert!(error.message().contains(part), "{error}");
    };
    refused(&|together| together.companions.truncate(1), "1 concepts");
    refused(&|together| together.scenes = 0, "0 scenes");
    refused(&|together| together.timestep_power = 1.5, "power 1.5");
    refused(&|together| together.timestep_power = f64::NAN, "power NaN");
    refused(&|together| (together.batch, together.lot) = (4, 3), "3 at a time");
    refused(&|together| together.tune.steps = 0, "0 steps");
    refused(&|together| together.companions[2].prompts = vec!["a <s3> vehicle".into()], "1 prompts for 2 pictures");
    refused(&|together| together.companions[2].prompts = vec!["a vehicle".into(); 2], "lacks \"<s3>\"");
    for (concept, part) in [
        (&erasing, "must draw a subject"),
        (&global, "in local scope"),
        (&twin, "two concepts have the trigger"),
        (&unheard, "unheard-of"),
    ] {
        let mut together = given.together();
        together.companions[1].concept = concept;
        let error = together.tune(&mut pipeline, &mut Job::default()).unwrap_err();
        assert!(error.status() == Status::InvalidArgument && error.message().contains(part), "{error}");
        assert!(error.message().contains("companions[1]"), "{error}");
    }
    let mut together = given.together();
    together.companions[1].pictures = &larger;
    let error = together.tune(&mut pipeline, &mut Job::default()).unwrap_err();
    assert!(error.message().contains("(64, 64), expected (32, 32)"), "{error}");
    // No token may be two concepts' own.
    let nested = changed(&|concept| concept.metadata.class_noun = "<s3>".into());
    let mut together = given.together();
    together.companions[1].concept = &nested;
    together.companions[1].prompts = vec!["a <s2> <s3> apple".into(); 2];
    let error = together.tune(&mut pipeline, &mut Job::default()).unwrap_err();
    assert!(error.status() == Status::InvalidArgument && error.message().contains("overlap"), "{error}");
    let other = changed(&|concept| concept.metadata.base = "00".repeat(32).parse().unwrap());
    let mut together = given.together();
    together.companions[1].concept = &other;
    assert_eq!(together.tune(&mut pipeline, &mut Job::default()).unwrap_err().status(), Status::WrongBase);
}
