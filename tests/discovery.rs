//! Searches on the shipped UNet find what the PyTorch reference finds from the same batches.

mod support;
mod unets;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use macula::Status;
use macula::concept::{Concept, GatheredConcept, Precision, Role, Scope, Weights};
use macula::diffusion::pipeline::{AppliedConcept, ConceptScope, DrawOptions, Images, Pipeline};
use macula::diffusion::unet::{Conditioning, UnetOptions};
use macula::discovery::search::{Bound, Found, Method, search};
use macula::discovery::{
    ActingRow, Attentions, Batch, Discovery, DiscoveryOptions, Erasure, Examples, Goal, GradientOptions,
    KeyValueGradient, MOST_CHOSEN, Members, Objective, Report, Request, Searched, Subject, Term, TuneOptions, Tuning,
};
use macula::onnx::grad::Spending;
use macula::progress::{CancelToken, Job, Progress};
use macula::runtime::{Runtime, RuntimeOptions};
use sha2::{Digest, Sha256};
use unets::Stored;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/emoji/onnx/unet/model.onnx");
const PIPELINE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/emoji/onnx");
const SUBJECT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/emoji/subjects/octopus");
const SHAPE: [usize; 3] = [3, 32, 32];
/// The shipped model's class of plain pictures of 32 pixels.
const SMALL: i64 = 4;

struct Reference(BTreeMap<String, Stored>);

impl Reference {
    fn of(scope: &str) -> Self {
        // Named by the model, too, so that another one is asked anew.
        let model = std::fs::read(MODEL).unwrap();
        let version: String = Sha256::digest(model).iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        Self(unets::tensors(&support::fixture("discovery.py", &[scope, &version]).join("batches.safetensors")))
    }

    fn f32s(&self, name: &str) -> Vec<f32> {
        self.0[name].data.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
    }

    fn i64s(&self, name: &str) -> Vec<i64> {
        self.0[name].data.as_chunks::<8>().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect()
    }

    fn batch(&self, at: usize) -> Batch {
        let of = |name: &str| format!("{at}.{name}");
        let text = &self.0[&of("text")];
        Batch {
            states: self.f32s(&of("state")),
            timesteps: self.i64s(&of("timestep")),
            targets: self.f32s(&of("v")),
            weights: self.f32s(&of("weight")),
            conditioning: Conditioning {
                batch: text.shape[0],
                tokens: text.shape[1],
                context: self.f32s(&of("text")),
                class_labels: Some(self.i64s(&of("labels"))),
                ..Conditioning::default()
            },
            rows: self.i64s(&of("rows")).into_iter().zip(self.i64s(&of("sets"))).map(acting).collect(),
        }
    }

    fn batches(&self) -> Vec<Batch> {
        (0..).take_while(|at| self.0.contains_key(&format!("{at}.state"))).map(|at| self.batch(at)).collect()
    }

    fn set(&self, name: &str) -> BTreeSet<usize> {
        self.i64s(name).into_iter().map(|index| index as usize).collect()
    }
}

fn acting((row, set): (i64, i64)) -> ActingRow {
    ActingRow { row: row as usize, set: set as usize }
}

fn open(batch: &Batch, options: GradientOptions) -> KeyValueGradient {
    support::onnxruntime();
    let runtime = Runtime::load(&RuntimeOptions::default()).unwrap();
    let mut options = options;
    options.session.intra_threads = 1;
    KeyValueGradient::open(&runtime, MODEL, batch, SHAPE, &options, &CancelToken::new()).unwrap()
}

/// The largest difference over the largest entry.
fn relative(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    found.iter().zip(expected).fold(0f32, |error, (a, b)| error.max((a - b).abs())) / largest
}

fn jaccard(found: &Found, expected: &BTreeSet<usize>) -> f64 {
    let found: BTreeSet<usize> = found.shut.iter().enumerate().filter(|(_, shut)| **shut).map(|(at, _)| at).collect();
    found.intersection(expected).count() as f64 / found.union(expected).count() as f64
}

fn agrees_with_the_reference(scope: &str, attentions: Attentions) {
    let reference = Reference::of(scope);
    let batches = reference.batches();
    let cancel = CancelToken::new();
    let options = || GradientOptions { attentions, ..GradientOptions::default() };
    let gradient = open(&batches[0], options());
    slopes_agree_with_the_reference(scope, &reference, &gradient);
    let ones = vec![1f32; gradient.len()];
    // In lots of one state the sums are the same but for rounding.
    let halves = open(&batches[0], GradientOptions { lot: 1, ..options() });
    let slope = halves.slope(&batches[0], SHAPE, &ones, &cancel).unwrap();
    assert!(relative(&slope.scales, &reference.f32s("slope")) <= 1e-4);
    // So they are when half of the forward pass is computed again.
    let spending = Spending { activations: Some(gradient.activations() / 2), ..Spending::default() };
    let again = open(&batches[0], GradientOptions { spending, ..options() });
    assert!(again.activations() <= gradient.activations() / 2, "{} bytes are kept", again.activations());
    let slope = again.slope(&batches[0], SHAPE, &ones, &cancel).unwrap();
    assert!(relative(&slope.scales, &reference.f32s("slope")) <= 1e-4);

    let count = gradient.len();
    let mut loss = |scales: &[f32], number: usize| gradient.slope(&batches[number], SHAPE, scales, &cancel);
    let share = |density: f64| Bound::Count((density * count as f64).round() as usize);
    let found = search(&mut loss, count, batches.len(), Method::Algorithm1 { rho: 0.0 }, share(0.002)).unwrap();
    let expected = f64::from(reference.f32s("agreement")[0]);
    assert!((found.agreement - expected).abs() <= 1e-3, "{} for {expected}", found.agreement);
    let same = jaccard(&found, &reference.set("saliency"));
    println!("{scope} saliency: Jaccard {same:.4}");
    assert!(same >= 0.98, "{scope} saliency: Jaccard {same}");
    let method = Method::LearntMask { rate: 0.2, penalty: 0.0 };
    let found = search(&mut loss, count, batches.len(), method, share(0.01)).unwrap();
    let same = jaccard(&found, &reference.set("learnt"));
    println!("{scope} learnt mask: Jaccard {same:.4}");
    assert!(same >= 0.98, "{scope} learnt mask: Jaccard {same}");
    tuning_agrees_with_the_reference(scope, &reference, &gradient, &batches);
}

/// At untouched weights and at random ones.
fn slopes_agree_with_the_reference(scope: &str, reference: &Reference, gradient: &KeyValueGradient) {
    let scales = reference.f32s("scales");
    for (name, scales) in [("slope", &vec![1.0; scales.len()]), ("mixed", &scales)] {
        let all: Vec<usize> = (0..scales.len()).collect();
        let batch = reference.batch(0);
        let slope = gradient.slope_of(&batch, SHAPE, &all, scales, &CancelToken::new()).unwrap();
        if scales.len() == gradient.len() {
            // The same by dense products.
            let dense = gradient.slope(&batch, SHAPE, scales, &CancelToken::new()).unwrap();
            let apart = relative(&slope.scales, &dense.scales);
            assert!(
                apart <= 1e-5 && (slope.loss - dense.loss).abs() <= 1e-6 * dense.loss,
                "{scope} {name}: {apart:.1e}"
            );
        }
        let expected = f64::from(reference.f32s(&format!("{name}_loss"))[0]);
        assert!((slope.loss - expected).abs() <= 1e-5 * expected, "{scope} {name}: {} for {expected}", slope.loss);
        let error = relative(&slope.scales, &reference.f32s(name));
        println!("{scope} {name}: {error:.1e}");
        assert!(error <= 1e-4, "{scope} {name}: {error:.1e}");
    }
}

/// How far values lie from others, as a share of those.
fn apart(values: &[f32], others: &[f32]) -> f32 {
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|value| value * value).sum::<f32>().sqrt();
    square(&mut values.iter().zip(others).map(|(a, b)| a - b)) / square(&mut others.iter().copied())
}

/// Gives the reference's set values in as many steps, over the same batches; among few levels too.
fn tuning_agrees_with_the_reference(
    scope: &str,
    reference: &Reference,
    gradient: &KeyValueGradient,
    batches: &[Batch],
) {
    let places: Vec<usize> = reference.set("learnt").into_iter().collect();
    let (weights, units) = (reference.f32s("untouched"), reference.f32s("units"));
    let begins = reference.0.contains_key("start").then(|| reference.f32s("start"));
    let values = begins.unwrap_or_else(|| vec![0.0; places.len()]);
    let parts = reference.i64s("parts").into_iter().map(|part| part as usize).collect();
    let members = Members { weights, units, values, parts };
    let mut loss = |scales: &[f32], number: usize| {
        gradient.slope_of(&batches[number], SHAPE, &places, scales, &CancelToken::new())
    };
    let theirs = |kept: &str| reference.f32s(&format!("{kept}.values"));
    // What rounding changes in so few steps is less than the bound of 1e-2.
    let rounding = apart(&theirs("quaternary"), &theirs("float32"));
    for precision in [Precision::F32, Precision::Quaternary] {
        let kept = precision.name();
        let losses = reference.f32s(&format!("{kept}.losses"));
        let options = TuneOptions { steps: losses.len(), precision, ..TuneOptions::default() };
        let mut tuning = Tuning::new(members.clone(), options).unwrap();
        while !tuning.is_done() {
            tuning.step(&mut loss).unwrap();
        }
        for (step, (ours, theirs)) in tuning.losses().iter().zip(&losses).enumerate() {
            assert!((ours - f64::from(*theirs)).abs() <= 1e-3 * ours, "{scope} {kept} {step}: {ours} for {theirs}");
        }
        let share = apart(&tuning.values().unwrap(), &theirs(kept));
        println!("{scope} tuning, {kept}: values within {share:.1e}");
        assert!(share <= 1e-2, "{scope} tuning, {kept}: values within {share:.1e} of the reference's");
        assert!(share <= rounding / 3.0, "{scope} tuning, {kept}: {share:.1e}, rounding changes {rounding:.1e}");
    }
}

#[test]
fn a_set_for_the_rows_of_its_own_words_is_the_references() {
    agrees_with_the_reference("local", Attentions::Cross);
}

#[test]
fn a_set_for_all_rows_is_the_references() {
    agrees_with_the_reference("global", Attentions::Cross);
}

#[test]
fn an_erasing_set_is_the_references() {
    agrees_with_the_reference("erase", Attentions::Cross);
}

#[test]
fn a_set_of_self_attention_too_is_the_references() {
    agrees_with_the_reference("both", Attentions::Both);
}

#[test]
fn sets_that_are_tuned_together_are_the_references() {
    let reference = Reference::of("together");
    let batches = reference.batches();
    let gradient = open(&batches[0], GradientOptions::default());
    slopes_agree_with_the_reference("together", &reference, &gradient);
    tuning_agrees_with_the_reference("together", &reference, &gradient, &batches);
    // One set can't act on the rows of two, a row has one set, and members have a place each.
    let ones = vec![1f32; gradient.len()];
    let mut shared = reference.batch(0);
    shared.rows.push(ActingRow { set: 0, ..shared.rows[shared.rows.len() - 1] });
    let mut twice = reference.batch(0);
    twice.rows.retain(|acting| acting.set == 0);
    twice.rows.push(twice.rows[0]);
    let refused = [
        gradient.slope(&batches[0], SHAPE, &ones, &CancelToken::new()),
        gradient.slope(&twice, SHAPE, &ones, &CancelToken::new()),
        gradient.slope_of(&shared, SHAPE, &[3], &[0.0], &CancelToken::new()),
        gradient.slope_of(&batches[0], SHAPE, &[3, 3], &[0.0; 2], &CancelToken::new()),
        gradient.slope_of(&batches[0], SHAPE, &[3], &[0.0; 2], &CancelToken::new()),
    ];
    refused.into_iter().for_each(|outcome| assert_eq!(outcome.err().unwrap().status(), Status::InvalidArgument));
}

fn pipeline(threads: usize) -> Pipeline {
    pipeline_with(threads, false)
}

fn pipeline_with(threads: usize, self_attention: bool) -> Pipeline {
    support::onnxruntime();
    let runtime = Runtime::load(&RuntimeOptions::default()).unwrap();
    let mut options = UnetOptions::default();
    options.self_attention = self_attention;
    options.threads = threads;
    options.session.intra_threads = threads;
    Pipeline::open(&runtime, PIPELINE, &options).unwrap()
}

fn pictures() -> Images {
    let mut pictures = Images::read(format!("{SUBJECT}/1.png"), 32, 32).unwrap();
    pictures.rgb.extend(Images::read(format!("{SUBJECT}/2.png"), 32, 32).unwrap().rgb);
    pictures.count = 2;
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
    (request.batches, request.batch, request.class_label) = (14, 2, SMALL);
    request
}

fn no_tiger() -> Request<'static> {
    let on = |phrase: &str| ["blue", "white"].map(|colour| format!("{phrase} on a {colour} background")).to_vec();
    let (prompts, anchors) = (on("a tiger"), on("an animal"));
    let mut request =
        Request::new(Goal::Erase(Erasure { word: "tiger".into(), prompts, anchors, size: Some((32, 32)) }));
    (request.batches, request.batch, request.class_label, request.drawn_pictures) = (24, 4, SMALL, 4);
    request
}

fn find(request: &Request<'_>, pipeline: &mut Pipeline) -> (Concept, Report) {
    request.find(pipeline, &mut Job::default()).unwrap()
}

#[test]
fn erasing_brings_predictions_to_the_anchors() {
    let mut request = no_tiger();
    request.preserve = vec!["a taxi".into()];
    let mut running = None;
    let mut report = |progress: Progress<'_>| {
        running = progress.loss.or(running);
        ControlFlow::Continue(())
    };
    let mut job = Job { cancel: CancelToken::new(), report: Some(&mut report) };
    let (concept, found) = request.find(&mut pipeline(1), &mut job).unwrap();
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let (first, last) = (mean(&found.losses[..6]), mean(&found.losses[18..]));
    println!("distance to the anchors: {first:.5}, then {last:.5}");
    assert!(last < 0.7 * first, "{:?}", found.losses);
    assert!((running.unwrap() - mean(&found.losses[14..])).abs() < 1e-12, "{running:?}");
    assert_eq!((concept.metadata.role, concept.metadata.scope), (Role::Erase, Scope::Local));
    assert_eq!(concept.metadata.trigger, "tiger");
    assert!(!concept.neurons.is_empty() && concept.neurons.density() <= 0.01);
}

/// Breaking off is a cancel at a batch; the other part runs with more threads.
#[test]
fn a_search_that_was_broken_off_finds_what_it_would_have_found_on_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let (pictures, kept) = (pictures(), folder.path().join("kept"));
    let mut request = octopus(&pictures);
    let (whole, of_whole) = find(&request, &mut pipeline(1));
    request.checkpoint = Some(kept.clone());
    let mut stop = |progress: Progress<'_>| match (progress.stage, progress.done) {
        ("search", 12) => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    let mut job = Job { cancel: CancelToken::new(), report: Some(&mut stop) };
    let error = request.find(&mut pipeline(1), &mut job).unwrap_err();
    assert_eq!(error.status(), Status::Cancelled);

    let mut two = pipeline(2);
    let mut before = Vec::new();
    let mut watch = |progress: Progress<'_>| {
        before.extend((progress.stage == "search").then_some(progress.done));
        ControlFlow::Continue(())
    };
    let mut job = Job { cancel: CancelToken::new(), report: Some(&mut watch) };
    let (resumed, of_resumed) = request.find(&mut two, &mut job).unwrap();
    assert_eq!(before, [12, 13, 14]);
    assert_eq!(resumed.neurons, whole.neurons);
    assert_eq!(of_resumed.losses[..12], of_whole.losses[..12]);
    // What has ended is found again without a batch.
    assert_eq!(find(&request, &mut two).0.neurons, whole.neurons);
    std::fs::remove_file(&kept).unwrap();
    tuning_goes_on(&mut request, &mut two);
    request.seed = 1;
    let error = request.find(&mut two, &mut Job::default()).unwrap_err();
    assert_eq!(error.status(), Status::InvalidArgument);
    assert!(error.message().contains("another search"), "{error}");
}

/// As above, in the tuning behind the search.
fn tuning_goes_on(request: &mut Request<'_>, pipeline: &mut Pipeline) {
    let kept = request.checkpoint.take();
    let precision = Precision::Quaternary;
    request.tune = Some(TuneOptions { steps: 13, precision, ..TuneOptions::default() });
    let (whole, of_whole) = find(request, pipeline);
    let values = whole.values.as_ref().unwrap();
    assert_eq!((values.precision(), of_whole.losses.len()), (precision, 14 + 13));
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    assert!(mean(&of_whole.losses[22..]) < mean(&of_whole.losses[..5]), "{:?}", of_whole.losses);
    request.checkpoint = kept;
    let mut stop = |progress: Progress<'_>| match (progress.stage, progress.done) {
        ("tune", 11) => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    let mut job = Job { cancel: CancelToken::new(), report: Some(&mut stop) };
    let error = request.find(pipeline, &mut job).unwrap_err();
    assert_eq!(error.status(), Status::Cancelled);
    let mut told = Vec::new();
    let mut watch = |progress: Progress<'_>| {
        told.extend((progress.stage == "tune").then_some(progress.done));
        ControlFlow::Continue(())
    };
    let mut job = Job { cancel: CancelToken::new(), report: Some(&mut watch) };
    let (resumed, of_resumed) = request.find(pipeline, &mut job).unwrap();
    assert_eq!(told, [11, 12, 13]);
    assert_eq!((&resumed.neurons, &resumed.values), (&whole.neurons, &whole.values));
    assert_eq!(of_resumed.losses, of_whole.losses);
    assert_eq!(find(request, pipeline).0.values, whole.values);
}

#[test]
fn keys_or_values_are_searched_alone() {
    let pictures = pictures();
    let mut request = octopus(&pictures);
    request.method = Method::Algorithm1 { rho: 0.0 };
    request.batches = 2;
    let mut pipeline = pipeline(1);
    let all = pipeline.unet().projections().unwrap().as_slice().len();
    for (searched, ending) in [(Searched::Keys, "to_k"), (Searched::Values, "to_v")] {
        request.searched = searched;
        let (concept, _) = find(&request, &mut pipeline);
        let layers = concept.neurons.layers();
        assert!(layers.len() == all / 2 && layers.iter().all(|layer| layer.path().ends_with(ending)), "{searched:?}");
        assert!(!concept.neurons.is_empty() && concept.neurons.density() <= 0.01);
    }
}

/// They are found by any pipeline, and composed by one that was opened for them.
#[test]
fn neurons_of_self_attention_are_found_and_composed() {
    let pictures = pictures();
    let mut request = octopus(&pictures);
    (request.method, request.batches, request.drawn_pictures) = (Method::Algorithm1 { rho: 0.0 }, 2, 0);
    let mut plain = pipeline(1);
    request.attentions = Attentions::SelfAttention;
    let error = request.find(&mut plain, &mut Job::default()).unwrap_err();
    assert_eq!(error.status(), Status::InvalidArgument);
    assert!(error.message().contains("global"), "{error}");
    request.scope = Scope::Global;
    let (concept, _) = find(&request, &mut plain);
    let layers = concept.neurons.layers();
    let all = plain.unet().projections().unwrap().as_slice().len();
    assert!(layers.len() == all && layers.iter().all(|layer| layer.path().contains(".attn1.to_")));
    request.searched = Searched::Values;
    assert!(find(&request, &mut plain).0.neurons.layers().iter().all(|layer| layer.path().ends_with(".attn1.to_v")));

    let apply = |pipeline: &mut Pipeline| -> Result<Vec<u8>, macula::Error> {
        let unet = pipeline.unet();
        let gathered = GatheredConcept::new(&concept, unet.projections().unwrap(), unet.pool())?;
        let (scope, strength) = (ConceptScope::Global, 1.0);
        pipeline.set_concepts(vec![AppliedConcept { concept: gathered, strength, scope, token: None }])?;
        Ok(draw(pipeline))
    };
    let error = apply(&mut plain).unwrap_err();
    assert_eq!(error.status(), Status::Unsupported);
    assert!(error.message().contains("attn1") && error.message().contains("self-attention"), "{error}");
    let (untouched, mut steered) = (draw(&mut plain), pipeline_with(1, true));
    let base = draw(&mut steered);
    let apart = |a: &[u8], b: &[u8]| a.iter().zip(b).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
    assert!(apart(&base, &untouched) <= 2, "opened for self-attention it draws {} apart", apart(&base, &untouched));
    let shut = apply(&mut steered).unwrap();
    assert!(apart(&shut, &base) > 2);
    steered.set_concepts(Vec::new()).unwrap();
    assert_eq!(draw(&mut steered), base);
}

/// Layers lie in a concept in the order of their paths, in a search cross-attention comes first: a tuned value is still that of
/// its own weight. The first of two steps of AdamW, the second being of length zero, moves every value equally far from zero, in
/// the unit of its own projection.
#[test]
fn tuned_values_of_both_attentions_are_those_of_their_weights() {
    let pictures = pictures();
    let mut request = octopus(&pictures);
    (request.method, request.batches, request.drawn_pictures) = (Method::Algorithm1 { rho: 0.0 }, 2, 0);
    (request.scope, request.attentions) = (Scope::Global, Attentions::Both);
    request.tune = Some(TuneOptions { steps: 2, precision: Precision::F32, ..TuneOptions::default() });
    let mut pipeline = pipeline_with(1, true);
    let (concept, _) = find(&request, &mut pipeline);
    let values = concept.values.as_ref().unwrap();
    let base = pipeline.unet().projections().unwrap();
    assert_eq!(concept.neurons.layers().len(), base.all().count());
    let mut steps = Vec::new();
    for (place, layer) in concept.neurons.layers().iter().enumerate() {
        let projection = base.all().find(|projection| projection.path == layer.path()).unwrap();
        let Weights::F16(weights) = &projection.weights else { panic!("the shipped model's weights are halves") };
        let count = weights.len() as f64;
        let mean = weights.iter().map(|weight| weight.to_f64()).sum::<f64>() / count;
        let unit = (weights.iter().map(|weight| (weight.to_f64() - mean).powi(2)).sum::<f64>() / count).sqrt();
        steps.extend(values.layer(place).iter().map(|value| f64::from(value.abs()) / unit));
    }
    steps.sort_by(f64::total_cmp);
    let (least, most) = (steps[steps.len() / 100], steps[steps.len() - 1]);
    println!("{} steps of {least} to {most}", steps.len());
    assert!(least > 0.0 && most / least < 1.0001, "steps of {least} to {most} units");
}

#[test]
fn a_search_that_shuts_nothing_says_so() {
    let pictures = pictures();
    let mut request = octopus(&pictures);
    // At this price no weight is shut.
    request.method = Method::LearntMask { rate: 0.04, penalty: 1.0 };
    let error = request.find(&mut pipeline(1), &mut Job::default()).unwrap_err();
    assert_eq!(error.status(), Status::NotFound, "{error}");
    assert!(error.message().contains("14 batches of 2"), "{error}");
}

fn draw(pipeline: &mut Pipeline) -> Vec<u8> {
    let mut options = DrawOptions::new("an animal on a blue background");
    options.steps = 4;
    pipeline.draw(&options, None, &mut Job::default()).unwrap().rgb
}

/// Of the sizes that are tried the one of the lowest loss is kept, and the report says them all.
#[test]
fn a_held_out_loss_chooses_the_density() {
    let pictures = pictures();
    let mut request = octopus(&pictures);
    (request.density, request.batches, request.batch) = (None, 24, 4);
    let mut told = Vec::new();
    let mut watch = |progress: Progress<'_>| {
        told.extend((progress.stage == "choose").then_some(progress.loss));
        ControlFlow::Continue(())
    };
    let mut job = Job { cancel: CancelToken::new(), report: Some(&mut watch) };
    let (concept, report) = request.find(&mut pipeline(2), &mut job).unwrap();
    println!("{:?}", report.sizes);
    assert_eq!(told, report.sizes.iter().map(|tried| Some(tried.1)).collect::<Vec<_>>());
    let most = (MOST_CHOSEN * concept.neurons.weights() as f64) as usize;
    assert!(report.sizes.is_sorted_by(|a, b| a.0 < b.0) && report.sizes.last().unwrap().0 == most);
    let best = report.sizes.iter().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    // Fewer where fewer would lower the loss.
    assert!(
        !concept.neurons.is_empty() && concept.neurons.len() <= best.0 as u64,
        "{} of {}",
        concept.neurons.len(),
        best.0
    );
    assert!(best.1 < report.sizes[0].1, "a larger set than the smallest is better here");
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let pictures = pictures();
    let mut pipeline = pipeline(1);
    let mut refused = |request: Request<'_>, part: &str| {
        let error = request.find(&mut pipeline, &mut Job::default()).unwrap_err();
        assert_eq!(error.status(), Status::InvalidArgument);
        assert!(error.message().contains(part), "{error}");
    };
    let erasing = |change: &dyn Fn(&mut Erasure)| {
        let mut request = no_tiger();
        let Goal::Erase(erasure) = &mut request.goal else { unreachable!() };
        change(erasure);
        request
    };
    refused(erasing(&|erasure| erasure.anchors.truncate(1)), "1 anchors for 2 prompts");
    refused(erasing(&|erasure| erasure.prompts.clear()), "for 0 prompts");
    refused(erasing(&|erasure| erasure.word = "cat".into()), "lacks \"cat\"");
    refused(erasing(&|erasure| erasure.word = " ".into()), "no word");
    refused(erasing(&|erasure| erasure.size = Some((32, 33))), "33 x 32");
    refused(Request { drawn_pictures: 0, density: Some(0.0), ..no_tiger() }, "density");
    refused(Request { preserve: vec!["a tiger".into()], preserve_weight: f32::NAN, ..no_tiger() }, "weight NaN");
    let none = Images { count: 0, rgb: Vec::new(), ..pictures.clone() };
    refused(octopus(&none), "no pictures");
    refused(Request { lot: 3, ..octopus(&pictures) }, "3 at a time");
    refused(Request { batches: 12, ..octopus(&pictures) }, "12 batches");
}

#[test]
fn a_gradient_that_is_not_finite_is_named_by_its_layer() {
    let mut batch = Reference::of("local").batch(0);
    let gradient = open(&batch, GradientOptions::default());
    batch.targets[0] = f32::INFINITY;
    let ones = vec![1f32; gradient.len()];
    let error = gradient.slope(&batch, SHAPE, &ones, &CancelToken::new()).err().unwrap();
    assert_eq!(error.status(), Status::NotFinite);
    assert!(error.message().contains(".attn2.to_"), "{error}");
}

#[test]
fn a_graph_without_a_text_input_is_refused() {
    support::onnxruntime();
    let runtime = Runtime::load(&RuntimeOptions::default()).unwrap();
    let batch = Reference::of("local").batch(0);
    let path = format!("{PIPELINE}/text_encoder/model.onnx");
    let options = GradientOptions::default();
    let error = KeyValueGradient::open(&runtime, path, &batch, SHAPE, &options, &CancelToken::new()).err().unwrap();
    assert!(error.message().contains("encoder_hidden_states"), "{error}");
    assert!(error.message().contains("text_encoder/model.onnx"), "{error}");
}

/// From another thread, at any moment of a search; what it leaves behind changes nothing of the next one.
#[test]
fn a_search_is_cancelled_at_a_hundred_moments() {
    let mut pipeline = pipeline(1);
    let pictures = pictures();
    let (states, shape) = pipeline.encode_images(&pictures, &CancelToken::new()).unwrap();
    let prompts = vec!["a <s2> animal".to_owned(); 2];
    let (conditioning, _) = pipeline.condition(&prompts, SMALL, (32, 32), &CancelToken::new()).unwrap();
    let examples =
        Examples { states, shape: [shape[1], shape[2], shape[3]], conditioning, rows: None, timestep_power: 1.0 };
    let term = Term { examples, objective: Objective::Untouched, anchors: None, weight: 1.0 };
    let other = Term { objective: Objective::Training, ..term.clone() };
    let discovery = Discovery::new(vec![other, term], pipeline.scheduler(None).unwrap()).unwrap();
    let options = DiscoveryOptions {
        method: Method::Algorithm1 { rho: 0.0 },
        bound: Bound::Count(1000),
        batches: 2,
        batch: 1,
        seed: 3,
        invert: None,
        tune: None,
        checkpoint: None,
    };
    let gradient = open(&discovery.example(&options).unwrap(), GradientOptions::default());
    let mut run = |job: &mut Job<'_>| discovery.run(pipeline.unet_mut(), &gradient, &options, job);
    let began = std::time::Instant::now();
    let whole = run(&mut Job::default()).unwrap();
    let long = began.elapsed();
    let mut cancelled = 0;
    for moment in 0..100 {
        let token = CancelToken::new();
        let mut job = Job { cancel: token.clone(), report: None };
        let outcome = std::thread::scope(|scope| {
            // Spread over the run, in an order that is not that of time.
            let wait = long * (moment * 37 % 100) / 100;
            scope.spawn(move || {
                std::thread::sleep(wait);
                token.cancel();
            });
            run(&mut job)
        });
        match outcome {
            Err(error) => {
                assert_eq!(error.status(), Status::Cancelled, "{error}");
                cancelled += 1;
            }
            Ok(found) => assert_eq!(found.neurons, whole.neurons),
        }
    }
    println!("{cancelled} of 100 runs of {long:?} were cancelled");
    assert!(cancelled >= 20, "{cancelled}");
    assert_eq!(run(&mut Job::default()).unwrap().neurons, whole.neurons);
}
