//! Rows of a text encoder's token embedding: given, learnt, composed, kept.

mod support;
mod unets;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use macula::Status;
use macula::concept::{Concept, GatheredConcept, LearntToken, NeuronSet, Scope};
use macula::diffusion::pipeline::{AppliedConcept, ConceptScope, DrawOptions, Images, Pipeline};
use macula::diffusion::unet::{Conditioning, UnetOptions};
use macula::discovery::search::{Bound, Method};
use macula::discovery::{
    Batch, Discovery, DiscoveryOptions, Erasure, Examples, Goal, GradientOptions, InvertOptions, KeyValueGradient,
    Objective, Request, Searched, Subject, Term, TokenTexts, TuneOptions,
};
use macula::onnx::grad::Effort;
use macula::onnx::{Limits, Model};
use macula::progress::{CancelToken, Job, Progress};
use macula::runtime::{Runtime, RuntimeOptions, Tensor};
use sha2::{Digest, Sha256};
use unets::Stored;

const SHIPPED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/emoji/onnx");
/// The shipped model's class of plain pictures of 32 pixels.
const SMALL: i64 = 4;
const SUBJECTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/emoji/subjects");

fn runtime() -> Runtime {
    support::onnxruntime();
    Runtime::load(&RuntimeOptions::default()).unwrap()
}

fn open(folder: impl AsRef<Path>, threads: usize) -> Pipeline {
    let mut options = UnetOptions::default();
    options.threads = threads;
    options.session.intra_threads = threads;
    Pipeline::open(&runtime(), folder, &options).unwrap()
}

/// A pipeline of `textual_inversion.py` and what PyTorch says of it.
struct Oracle {
    folder: PathBuf,
    word: String,
    prompts: Vec<String>,
    stored: BTreeMap<String, Stored>,
}

impl Oracle {
    fn of(kind: &str) -> Self {
        // What the fixture was made from: the loss goes through both.
        let mut digest = Sha256::new();
        for part in ["text_encoder", "unet"] {
            digest.update(std::fs::read(format!("{SHIPPED}/{part}/model.onnx")).unwrap());
        }
        let version: String = digest.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        let folder = support::fixture("textual_inversion.py", &[kind, &version]);
        let texts: serde_json::Value =
            serde_json::from_slice(&std::fs::read(folder.join("texts.json")).unwrap()).unwrap();
        let prompts = texts["prompts"].as_array().unwrap().iter();
        Self {
            word: texts["word"].as_str().unwrap().to_owned(),
            prompts: prompts.map(|prompt| prompt.as_str().unwrap().to_owned()).collect(),
            stored: unets::tensors(&folder.join("expected.safetensors")),
            folder: if kind == "emoji" { SHIPPED.into() } else { folder.join("model") },
        }
    }

    fn f32s(&self, name: &str) -> Vec<f32> {
        self.stored[name].data.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
    }

    fn i64s(&self, name: &str) -> Vec<i64> {
        self.stored[name].data.as_chunks::<8>().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect()
    }

    fn rows(&self) -> Vec<Vec<f32>> {
        let names = (0..).map(|encoder| format!("row.{encoder}")).take_while(|name| self.stored.contains_key(name));
        names.map(|name| self.f32s(&name)).collect()
    }
}

/// A concept that shuts nothing and has learnt rows.
fn learnt(pipeline: &Pipeline, word: &str, rows: Vec<Vec<f32>>, strength: f32) -> AppliedConcept {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let projections = pipeline.unet().projections().unwrap();
    let concept = GatheredConcept::from_neurons(&NeuronSet::default(), projections, &pool).unwrap();
    AppliedConcept {
        concept,
        strength,
        scope: ConceptScope::Global,
        token: Some(LearntToken::new(word, rows).unwrap()),
    }
}

fn encoding(pipeline: &mut Pipeline, prompt: &str) -> (Vec<f32>, Option<Vec<f32>>) {
    let encoded = pipeline.encode_prompt(prompt, &CancelToken::new()).unwrap();
    (encoded.context.clone(), encoded.pooled.clone())
}

/// The largest difference over the largest entry.
fn relative(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    found.iter().zip(expected).fold(0f32, |error, (a, b)| error.max((a - b).abs())) / largest
}

/// What the encoder's own file says of a prompt of one chunk, without any input for rows.
fn untouched(pipeline: &Pipeline, folder: &Path, prompt: &str) -> Vec<f32> {
    let runtime = runtime();
    let model = Model::open(folder.join("text_encoder/model.onnx"), &Limits::default()).unwrap();
    let mut options = UnetOptions::default().session;
    options.intra_threads = 1;
    let session = runtime.session(&model, &options).unwrap();
    let chunk = &pipeline.tokenizer().unwrap().tokenize(prompt).unwrap().chunks()[0].clone();
    let ids: Vec<i64> = chunk.iter().map(|id| i64::from(*id)).collect();
    let ids = Tensor::from_vec(&[1, ids.len()], ids).unwrap();
    let answers = session.run(&[("input_ids", &ids)], &["last_hidden_state"], &CancelToken::new()).unwrap();
    match answers[0].as_slice::<f32>() {
        Ok(values) => values.to_vec(),
        Err(_) => answers[0].as_slice::<half::f16>().unwrap().iter().map(|value| value.to_f32()).collect(),
    }
}

/// Rows that are given change encodings as PyTorch's table would; nothing given, and given no more, changes no bit.
fn rows_agree(kind: &str, bound: f32) {
    let oracle = Oracle::of(kind);
    let mut pipeline = open(&oracle.folder, 1);
    let before: Vec<_> = oracle.prompts.iter().map(|prompt| encoding(&mut pipeline, prompt)).collect();
    if oracle.rows().len() == 1 {
        for (prompt, (context, _)) in oracle.prompts.iter().zip(&before) {
            assert_eq!(*context, untouched(&pipeline, &oracle.folder, prompt), "{kind}: {prompt}");
        }
    }
    let other = encoding(&mut pipeline, "a cat");
    let given = learnt(&pipeline, &oracle.word, oracle.rows(), 1.0);
    pipeline.set_concepts(vec![given.clone()]).unwrap();
    let after: Vec<_> = oracle.prompts.iter().map(|prompt| encoding(&mut pipeline, prompt)).collect();
    let found: Vec<f32> = after.iter().flat_map(|(context, _)| context.clone()).collect();
    let (error, moved) = (relative(&found, &oracle.f32s("context")), relative(&after[0].0, &before[0].0));
    println!("{kind}: encodings within {error:.1e}, moved by {moved:.1e}");
    assert!(error <= bound && moved > 20.0 * bound, "{kind}: {error:.1e}, moved {moved:.1e}");
    if oracle.stored.contains_key("pooled") {
        let pooled: Vec<f32> = after.iter().flat_map(|(_, pooled)| pooled.clone().unwrap()).collect();
        let error = relative(&pooled, &oracle.f32s("pooled"));
        assert!(error <= bound, "{kind}: pooled encodings differ by {error:.1e}");
    }
    assert_eq!(encoding(&mut pipeline, "a cat"), other, "a text without the word");
    // At no strength the row is the table's.
    let nothing = AppliedConcept { strength: 0.0, ..given.clone() };
    pipeline.set_concepts(vec![nothing]).unwrap();
    assert_eq!(encoding(&mut pipeline, &oracle.prompts[0]), before[0]);
    pipeline.set_concepts(vec![AppliedConcept { strength: 0.5, ..given.clone() }]).unwrap();
    let half = encoding(&mut pipeline, &oracle.prompts[0]);
    assert!(half != before[0] && half != after[0]);
    pipeline.set_concepts(vec![given]).unwrap();
    assert_eq!(encoding(&mut pipeline, &oracle.prompts[0]), after[0]);
    pipeline.set_concepts(Vec::new()).unwrap();
    assert_eq!(encoding(&mut pipeline, &oracle.prompts[0]), before[0]);
}

#[test]
fn the_shipped_encoder_takes_rows_as_pytorch_does() {
    rows_agree("emoji", 1e-5);
}

#[test]
fn clip_encoders_of_torchscript_take_rows_as_pytorch_does() {
    rows_agree("sd1", 1e-5);
    rows_agree("sdxl", 1e-5);
}

#[test]
fn clip_encoders_of_dynamo_take_rows_as_pytorch_does() {
    rows_agree("dynamo20", 1e-5);
    if std::env::var_os("MACULA_FULL_TESTS").is_some_and(|value| value == "1") {
        rows_agree("dynamo17", 1e-5);
        rows_agree("dynamo20-raw", 1e-5);
    }
}

#[test]
fn a_half_precision_encoder_takes_rows_as_pytorch_does() {
    rows_agree("half", 2e-3);
}

/// The slope of a loss of the UNet with respect to the rows, through UNet and text encoders, beside torch.autograd's.
fn slopes_agree(kind: &str, bound: f32, lot: usize, effort: Effort) {
    let oracle = Oracle::of(kind);
    let mut pipeline = open(&oracle.folder, 1);
    let cancel = CancelToken::new();
    let texts = TokenTexts::open(&pipeline, &oracle.prompts, &oracle.word, "", effort, &cancel).unwrap();
    let rows = oracle.rows();
    let of: Vec<Option<usize>> = oracle.i64s("text").into_iter().map(|text| Some(text as usize)).collect();
    let prompts: Vec<String> = of.iter().flatten().map(|&text| oracle.prompts[text].clone()).collect();
    let side = oracle.stored["state"].shape[2];
    let (mut base, _) = pipeline.condition(&prompts, 0, (side, side), &cancel).unwrap();
    if base.class_labels.is_some() {
        base.class_labels = Some(oracle.i64s("labels"));
    }
    let batch = Batch {
        states: oracle.f32s("state"),
        timesteps: oracle.i64s("timestep"),
        targets: oracle.f32s("target"),
        weights: oracle.f32s("weight"),
        conditioning: texts.encode(&rows, &base, &of, &cancel).unwrap(),
        rows: Vec::new(),
    };
    let context: Vec<f32> = oracle.f32s("context");
    let width = context.len() / oracle.prompts.len();
    let error = relative(&batch.conditioning.context[..width], &context[..width]);
    assert!(error <= bound, "{kind}: encodings differ by {error:.1e}");
    let (spending, searched) = (effort.into(), Searched::Keys);
    let mut options = GradientOptions { lot, spending, texts: true, searched, ..Default::default() };
    options.session.intra_threads = 1;
    let (shape, path) = ([3, side, side], oracle.folder.join("unet/model.onnx"));
    let gradient = KeyValueGradient::open(&runtime(), path, &batch, shape, &options, &cancel).unwrap();
    let slope = gradient.text_slope(&batch, shape, &of, oracle.prompts.len(), &cancel).unwrap();
    let expected = f64::from(oracle.f32s("loss")[0]);
    assert!((slope.loss - expected).abs() <= f64::from(bound) * expected, "{kind}: {} for {expected}", slope.loss);
    let found = texts.slope(&rows, &slope, &cancel).unwrap();
    assert_eq!(found.len(), rows.len());
    for (encoder, found) in found.iter().enumerate() {
        let error = relative(found, &oracle.f32s(&format!("gradient.{encoder}")));
        println!("{kind}, text encoder {encoder}: gradient within {error:.1e}");
        assert!(error <= bound, "{kind}, text encoder {encoder}: {error:.1e}");
    }
    let plain = GradientOptions { texts: false, ..options };
    let path = oracle.folder.join("unet/model.onnx");
    let plain = KeyValueGradient::open(&runtime(), path, &batch, shape, &plain, &cancel).unwrap();
    let refused = plain.text_slope(&batch, shape, &of, oracle.prompts.len(), &cancel).err().unwrap();
    assert_eq!(refused.status(), Status::InvalidArgument);
}

#[test]
fn the_shipped_models_slope_is_pytorchs() {
    slopes_agree("emoji", 1e-4, 0, Effort::Speed);
    slopes_agree("emoji", 1e-4, 1, Effort::Memory);
}

#[test]
fn slopes_through_clip_encoders_are_pytorchs() {
    slopes_agree("sd1", 1e-4, 0, Effort::Speed);
    slopes_agree("sdxl", 1e-4, 0, Effort::Speed);
    slopes_agree("dynamo20", 1e-4, 0, Effort::Speed);
    slopes_agree("half", 1e-2, 0, Effort::Speed);
}

#[test]
fn rows_that_are_no_rows_of_the_model_are_refused_and_change_nothing() {
    let mut pipeline = open(SHIPPED, 1);
    let before = encoding(&mut pipeline, "a <s1> apple");
    let row = pipeline.text_encoders()[0].row(5, &CancelToken::new()).unwrap();
    let mut refused = |concepts: Vec<AppliedConcept>, part: &str| {
        let error = pipeline.set_concepts(concepts).unwrap_err();
        assert_eq!(error.status(), Status::InvalidArgument);
        assert!(error.message().contains(part), "{error}");
        assert!(pipeline.concepts().is_empty());
        assert_eq!(encoding(&mut pipeline, "a <s1> apple"), before);
        pipeline.set_concepts(Vec::new()).unwrap();
        learnt(&pipeline, "<s1>", vec![row.clone()], 1.0)
    };
    let good = refused(Vec::from([learnt(&open(SHIPPED, 1), "<s1>", vec![vec![1.0; 7]], 1.0)]), "has 7 numbers");
    let token = |word: &str, rows: Vec<Vec<f32>>| Some(LearntToken::new(word, rows).unwrap());
    let with = |word: &str, rows: Vec<Vec<f32>>| vec![AppliedConcept { token: token(word, rows), ..good.clone() }];
    refused(with("<s1>", vec![row.clone(), row.clone()]), "learnt for 2 text encoders, this model has 1");
    refused(with("green apple", vec![row.clone()]), "no single token");
    refused(with("notaword", vec![row.clone()]), "no single token");
    refused(vec![good.clone(), AppliedConcept { strength: 0.5, ..good.clone() }], "one token, \"<s1>\"");
}

/// The mean loss of a concept on the pictures of its subject that no search sees, over draws of noise, as it is drawn.
fn held_out(pipeline: &mut Pipeline, name: &str, word: &str, concept: Option<AppliedConcept>, draws: u64) -> f64 {
    let described: serde_json::Value =
        serde_json::from_slice(&std::fs::read(format!("{SUBJECTS}/subjects.json")).unwrap()).unwrap();
    let (noun, colours) = (described[name]["class_noun"].as_str().unwrap(), &described[name]["test_colours"]);
    let colours: Vec<&str> = colours.as_array().unwrap().iter().map(|colour| colour.as_str().unwrap()).collect();
    let row = Images::read(format!("{SUBJECTS}/{name}/test.png"), 32 * colours.len(), 32).unwrap();
    let planes = row.to_planes().unwrap();
    let width = row.width;
    let prompts: Vec<String> =
        colours.iter().map(|colour| format!("a {word} {noun} on a {colour} background")).collect();
    let states: Vec<f32> = (0..colours.len())
        .flat_map(|at| (0..96).map(move |line| line * width + at * 32))
        .flat_map(|begin| planes[begin..begin + 32].to_vec())
        .collect();
    let schedule = pipeline.scheduler(None).unwrap();
    let options = |seed| DiscoveryOptions {
        method: Method::default(),
        bound: Bound::Count(1),
        batches: 1,
        batch: colours.len(),
        seed,
        invert: None,
        tune: None,
        checkpoint: None,
    };
    pipeline.set_concepts(concept.into_iter().collect()).unwrap();
    let cancel = CancelToken::new();
    let (conditioning, texts) = pipeline.condition(&prompts, SMALL, (32, 32), &cancel).unwrap();
    let mut sum = 0.0;
    for seed in 0..draws {
        let mut one_by_one = 0.0;
        for (at, text) in texts.iter().enumerate() {
            let own = conditioning.context.len() / texts.len();
            let own = Conditioning {
                batch: 1,
                context: conditioning.context[at * own..(at + 1) * own].to_vec(),
                class_labels: Some(vec![SMALL]),
                ..conditioning.clone()
            };
            let state = states[at * 3072..(at + 1) * 3072].to_vec();
            let examples = Examples {
                states: state,
                shape: [3, 32, 32],
                conditioning: own.clone(),
                rows: None,
                timestep_power: 1.0,
            };
            let term = Term { examples, objective: Objective::Training, anchors: None, weight: 1.0 };
            // One picture, at a timestep of its own share of the schedule.
            let discovery = Discovery::new(vec![term], schedule.clone()).unwrap();
            let drawn = discovery.example(&DiscoveryOptions { batch: 1, ..options(seed << 8 | at as u64) }).unwrap();
            let timestep = drawn.timesteps[0] as f64;
            let (shape, cancel) = ([1, 3, 32, 32], CancelToken::new());
            let said = pipeline.denoise(&drawn.states, shape, timestep, 0, &own, 0, Some(text), &cancel).unwrap();
            let square = |(a, b): (&f32, &f32)| f64::from(a - b).powi(2);
            one_by_one += said.iter().zip(&drawn.targets).map(square).sum::<f64>() / said.len() as f64;
        }
        sum += one_by_one / texts.len() as f64;
    }
    sum / draws as f64
}

fn pictures(name: &str) -> Images {
    let read = |number: usize| Images::read(format!("{SUBJECTS}/{name}/{number}.png"), 32, 32).unwrap();
    let mut pictures = read(1);
    for number in 2..=4 {
        pictures.rgb.extend(read(number).rgb);
        pictures.count += 1;
    }
    pictures
}

fn octopus(pictures: &Images) -> Request<'_> {
    let (trigger, class_noun) = ("<s2>".to_owned(), "animal".to_owned());
    let mut request = Request::new(Goal::Implant(Subject {
        pictures,
        prompts: Vec::new(),
        trigger,
        class_noun,
        class_pictures: None,
    }));
    request.method = Method::Algorithm1 { rho: 0.0 };
    (request.batches, request.batch, request.class_label) = (3, 4, SMALL);
    request.invert = Some(InvertOptions { steps: 12, ..InvertOptions::default() });
    request
}

fn draw(pipeline: &mut Pipeline) -> Vec<u8> {
    let mut options = DrawOptions::new("a <s2> animal on a blue background");
    (options.steps, options.width, options.height, options.class_label) = (4, Some(32), Some(32), SMALL);
    pipeline.draw(&options, None, &mut Job::default()).unwrap().rgb
}

/// The pictures of the test were not learnt from; the row comes and goes with the concept, also from a file.
#[test]
fn a_learnt_row_lowers_the_loss_of_unseen_pictures_and_goes_with_its_concept() {
    let mut pipeline = open(SHIPPED, 2);
    let pictures = pictures("octopus");
    let mut request = octopus(&pictures);
    request.invert = Some(InvertOptions { steps: 40, ..InvertOptions::default() });
    let (concept, report) = request.find(&mut pipeline, &mut Job::default()).unwrap();
    let inverted = report.inverted.unwrap();
    assert_eq!(concept.token.as_ref(), Some(&inverted.token));
    assert!(inverted.losses.len() == 40 && report.losses.len() == 3);
    println!("held-out noises: {:?}", inverted.held_out);
    assert!(inverted.held_out.1 < 0.97 * inverted.held_out.0, "{:?}", inverted.held_out);
    let base = held_out(&mut pipeline, "octopus", "<s2>", None, 2);
    let row = learnt(&pipeline, "<s2>", inverted.token.rows().to_vec(), 1.0);
    let with_row = held_out(&mut pipeline, "octopus", "<s2>", Some(row.clone()), 2);
    println!("unseen pictures: {base:.5}, with the row {with_row:.5}");
    assert!(with_row < 0.97 * base, "{with_row} for {base}");

    pipeline.set_concepts(Vec::new()).unwrap();
    let untouched = draw(&mut pipeline);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("octopus.safetensors");
    concept.save(&file).unwrap();
    let loaded = Concept::load(&file).unwrap();
    assert_eq!(loaded, concept);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let applied = |pipeline: &Pipeline, concept: &Concept| AppliedConcept {
        concept: GatheredConcept::new(concept, pipeline.unet().projections().unwrap(), &pool).unwrap(),
        strength: 1.0,
        scope: ConceptScope::Words(vec!["<s2>".into()]),
        token: concept.token.clone(),
    };
    let (whole, bare) = (applied(&pipeline, &loaded), Concept { token: None, ..concept.clone() });
    pipeline.set_concepts(vec![whole.clone()]).unwrap();
    let with_both = draw(&mut pipeline);
    let bare = applied(&pipeline, &bare);
    pipeline.set_concepts(vec![bare]).unwrap();
    let with_neurons = draw(&mut pipeline);
    let apart = [&untouched, &with_both, &with_neurons];
    assert!(apart[0] != apart[1] && apart[0] != apart[2] && apart[1] != apart[2]);
    // Another concept's row, for another word, and this one again.
    let other = learnt(&pipeline, "<s1>", inverted.token.rows().to_vec(), 1.0);
    pipeline.set_concepts(vec![other]).unwrap();
    assert_eq!(draw(&mut pipeline), untouched);
    pipeline.set_concepts(vec![whole]).unwrap();
    assert_eq!(draw(&mut pipeline), with_both);
    pipeline.set_concepts(Vec::new()).unwrap();
    assert_eq!(draw(&mut pipeline), untouched);
}

/// Breaking off is a cancel at a step of each stage; the other parts run with more threads.
#[test]
fn an_inversion_that_was_broken_off_ends_as_in_one_go_on_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let (pictures, kept) = (pictures("octopus"), folder.path().join("kept"));
    let mut request = octopus(&pictures);
    request.tune = Some(TuneOptions { steps: 4, ..TuneOptions::default() });
    let (whole, of_whole) = request.find(&mut open(SHIPPED, 1), &mut Job::default()).unwrap();
    request.checkpoint = Some(kept);
    let mut two = open(SHIPPED, 2);
    for (stage, at) in [("invert", 7), ("search", 2), ("tune", 1)] {
        let mut begun = None;
        let mut stop = |progress: Progress<'_>| {
            begun = begun.or((progress.stage == stage).then_some(progress.done));
            assert!(progress.stage != "search" || progress.loss.is_some() || progress.done == 0);
            match (progress.stage, progress.done) {
                here if here == (stage, at) => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            }
        };
        let mut job = Job { cancel: CancelToken::new(), report: Some(&mut stop) };
        let error = request.find(&mut two, &mut job).unwrap_err();
        assert_eq!((error.status(), begun), (Status::Cancelled, Some(0)), "{stage}");
    }
    let mut told = Vec::new();
    let mut watch = |progress: Progress<'_>| {
        told.push((progress.stage.to_owned(), progress.done));
        ControlFlow::Continue(())
    };
    let mut job = Job { cancel: CancelToken::new(), report: Some(&mut watch) };
    let (resumed, of_resumed) = request.find(&mut two, &mut job).unwrap();
    told.retain(|(stage, _)| stage != "differentiate");
    let stages = [("invert", 12), ("search", 3), ("tune", 1), ("tune", 2), ("tune", 3), ("tune", 4)];
    assert_eq!(told, stages.map(|(stage, done)| (stage.to_owned(), done)));
    assert_eq!((&resumed.token, &resumed.neurons, &resumed.values), (&whole.token, &whole.neurons, &whole.values));
    assert_eq!((of_resumed.inverted, of_resumed.losses), (of_whole.inverted, of_whole.losses));
    request.invert = Some(InvertOptions { steps: 13, ..InvertOptions::default() });
    let error = request.find(&mut two, &mut Job::default()).unwrap_err();
    assert!(error.status() == Status::InvalidArgument && error.message().contains("another search"), "{error}");
}

/// Texts with and without the word, of several pictures and parts of the loss; states one at a time are the whole batch.
#[test]
fn a_word_in_some_of_the_texts_is_learnt_from_these() {
    let mut pipeline = open(SHIPPED, 2);
    let pictures = pictures("octopus");
    let mut request = octopus(&pictures);
    let Goal::Implant(subject) = &mut request.goal else { unreachable!() };
    subject.prompts =
        ["blue", "white", "blue", "red"].map(|colour| format!("a <s2> animal on a {colour} background")).into();
    request.scope = Scope::Global;
    request.preserve = vec!["a <s2> tree".into(), "a taxi".into()];
    request.drawn_pictures = 2;
    request.invert = Some(InvertOptions { steps: 3, ..InvertOptions::default() });
    let (whole, _) = request.find(&mut pipeline, &mut Job::default()).unwrap();
    request.lot = 1;
    let (parts, _) = request.find(&mut pipeline, &mut Job::default()).unwrap();
    let start =
        pipeline.text_encoders()[0].row(pipeline.tokenizer().unwrap().token("animal").unwrap(), &CancelToken::new());
    let row = |concept: &Concept| concept.token.as_ref().unwrap().rows()[0].clone();
    let moved = relative(&row(&whole), &start.unwrap());
    let apart = relative(&row(&parts), &row(&whole));
    println!("moved by {moved:.1e}, in lots of one by {apart:.1e} less or more");
    assert!(moved > 1e-3 && apart < 1e-3 * moved);
}

/// SDXL's shape: the first chunk of a long prompt goes into the pooled encoding too, the others do not.
#[test]
fn two_text_encoders_learn_a_row_each() {
    let oracle = Oracle::of("sdxl");
    let mut pipeline = open(&oracle.folder, 2);
    let pictures = Images::read(format!("{SUBJECTS}/octopus/1.png"), 16, 16).unwrap();
    let mut request = octopus(&pictures);
    let Goal::Implant(subject) = &mut request.goal else { unreachable!() };
    (subject.trigger, subject.class_noun) = ("red".into(), "fox".into());
    subject.prompts = vec![format!("a red fox {} red", "quick brown ".repeat(40))];
    request.class_label = 0;
    let (concept, report) = request.find(&mut pipeline, &mut Job::default()).unwrap();
    let (rows, held_out) = (concept.token.clone().unwrap(), report.inverted.unwrap().held_out);
    assert_eq!(rows.rows().iter().map(Vec::len).collect::<Vec<_>>(), [64, 32]);
    println!("held-out noises: {held_out:?}");
    assert!(held_out.1 < held_out.0, "{held_out:?}");
    let base = encoding(&mut pipeline, "a red fox");
    let row = learnt(&pipeline, "red", rows.rows().to_vec(), 1.0);
    pipeline.set_concepts(vec![row]).unwrap();
    let (context, pooled) = encoding(&mut pipeline, "a red fox");
    assert!(context != base.0 && pooled != base.1);
    pipeline.set_concepts(Vec::new()).unwrap();
    assert_eq!(encoding(&mut pipeline, "a red fox"), base);
}

#[test]
fn inversions_that_make_no_sense_are_refused() {
    let pictures = pictures("octopus");
    let mut pipeline = open(SHIPPED, 1);
    let mut refused = |request: Request<'_>, part: &str| {
        let error = request.find(&mut pipeline, &mut Job::default()).unwrap_err();
        assert_eq!(error.status(), Status::InvalidArgument);
        assert!(error.message().contains(part), "{error}");
    };
    let with = |options: InvertOptions| Request { invert: Some(options), ..octopus(&pictures) };
    let good = InvertOptions::default();
    refused(with(InvertOptions { steps: 0, ..good }), "0 steps of textual inversion");
    refused(with(InvertOptions { rate: f32::INFINITY, ..good }), "rate inf");
    let erasure = Erasure {
        word: "tiger".into(),
        prompts: vec!["a tiger".into()],
        anchors: vec!["an animal".into()],
        size: None,
    };
    refused(Request { goal: Goal::Erase(erasure), ..octopus(&pictures) }, "only of a subject's word");
}
