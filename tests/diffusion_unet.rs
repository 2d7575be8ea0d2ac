//! UNets with keys and values fed from outside: against PyTorch, against the untouched model, and what they refuse.

mod support;

use std::path::{Path, PathBuf};
use std::slice::from_mut;

use macula::concept::{Composition, GatheredConcept, Indices, Layer, NeuronSet, Rows};
use macula::diffusion::guidance::{Guidance, Noise, StepReport, Walk};
use macula::diffusion::schedule::{Plan, PlanOptions, SchedulerConfig};
use macula::diffusion::unet::{Conditioning, Unet, UnetOptions};
use macula::onnx::{Limits, Model};
use macula::progress::{CancelToken, Job};
use macula::runtime::{ElementType, Runtime, RuntimeOptions, SessionOptions, Tensor};
use macula::{Error, Status};
use serde_json::{Value, json};

fn runtime() -> Runtime {
    support::onnxruntime();
    Runtime::load(&RuntimeOptions::default()).unwrap()
}

struct Fixture {
    folder: PathBuf,
    cases: Value,
    values: Vec<f32>,
}

impl Fixture {
    fn new(kind: &str) -> Self {
        let folder = support::fixture("unets.py", &[kind]);
        let cases = serde_json::from_slice(&std::fs::read(folder.join("cases.json")).unwrap()).unwrap();
        Self { cases, values: support::read_f32(folder.join("values.f32")), folder }
    }

    fn model(&self) -> PathBuf {
        self.folder.join("model/model.onnx")
    }

    fn open(&self, threads: usize) -> Unet {
        self.open_with(threads, false)
    }

    fn open_with(&self, threads: usize, self_attention: bool) -> Unet {
        let mut options = UnetOptions::default();
        options.self_attention = self_attention;
        options.session.intra_threads = 1;
        options.threads = threads;
        Unet::open(&runtime(), self.model(), &options).unwrap()
    }

    fn part(&self, place: &Value) -> (&[f32], Vec<usize>) {
        let sizes = place["shape"].as_array().unwrap().iter();
        let shape: Vec<usize> = sizes.map(|size| size.as_u64().unwrap() as usize).collect();
        let offset = place["offset"].as_u64().unwrap() as usize;
        (&self.values[offset..offset + shape.iter().product::<usize>()], shape)
    }

    fn case(&self, what: &str) -> Case<'_> {
        let cases = self.cases["predictions"].as_array().unwrap();
        let case = cases.iter().find(|case| case["what"] == what).unwrap();
        let (sample, shape) = self.part(&case["sample"]);
        let (context, context_shape) =
            case.get("context").map_or((&[][..], vec![shape[0], 0, 0]), |place| self.part(place));
        Case {
            sample,
            shape: shape.try_into().unwrap(),
            timestep: case["timestep"].as_f64().unwrap(),
            output: self.part(&case["output"]).0,
            conditioning: Conditioning {
                batch: context_shape[0],
                tokens: context_shape[1],
                context: context.to_vec(),
                class_labels: case
                    .get("labels")
                    .map(|labels| labels.as_array().unwrap().iter().map(|label| label.as_i64().unwrap()).collect()),
                ..Conditioning::default()
            },
        }
    }

    /// The neurons of some of the cases' sets: `sets`, `self_sets`.
    fn neurons(&self, sets: &[&str]) -> NeuronSet {
        let layer = |(path, set): (&String, &Value)| {
            let (out, inputs) = (set[0].as_u64().unwrap() as usize, set[1].as_u64().unwrap() as usize);
            let indices = set[2].as_array().unwrap().iter().map(|index| index.as_u64().unwrap() as u32).collect();
            Layer::new(path, out, inputs, Indices::from_sorted((out * inputs) as u32, indices).unwrap()).unwrap()
        };
        let layers = sets.iter().flat_map(|sets| self.cases[*sets].as_object().unwrap().iter().map(layer));
        NeuronSet::new(layers.collect()).unwrap()
    }
}

struct Case<'a> {
    sample: &'a [f32],
    shape: [usize; 4],
    timestep: f64,
    output: &'a [f32],
    conditioning: Conditioning,
}

impl Case<'_> {
    fn predict(&self, unet: &mut Unet) -> Vec<f32> {
        unet.set_conditioning(&self.conditioning).unwrap();
        self.again(unet).unwrap()
    }

    fn again(&self, unet: &mut Unet) -> Result<Vec<f32>, Error> {
        unet.denoise(self.sample, self.shape, self.timestep, &CancelToken::new())
    }
}

/// What the model file predicts, as ONNX Runtime runs it untouched.
fn untouched(model: &Path, case: &Case<'_>) -> Vec<f32> {
    let mut options = SessionOptions::default();
    options.intra_threads = 1;
    let session = runtime().session(&Model::open(model, &Limits::default()).unwrap(), &options).unwrap();
    let batch = case.shape[0];
    let Conditioning { tokens, context, class_labels, .. } = &case.conditioning;
    let sample = Tensor::from_slice(&case.shape, case.sample).unwrap();
    let time = Tensor::from_vec(&[batch], vec![case.timestep as i64; batch]).unwrap();
    let context = Tensor::from_slice(&[batch, *tokens, context.len() / batch / tokens], context).unwrap();
    let labels = Tensor::from_slice(&[batch], class_labels.as_ref().unwrap()).unwrap();
    let inputs =
        [("sample", &sample), ("timestep", &time), ("encoder_hidden_states", &context), ("class_labels", &labels)];
    session.run(&inputs, &[], &CancelToken::new()).unwrap()[0].as_slice::<f32>().unwrap().to_vec()
}

#[test]
fn predictions_agree_with_pytorch_and_with_the_untouched_model() {
    let fixture = Fixture::new("text");
    let mut unet = fixture.open(2);
    for what in ["plain", "other sizes"] {
        let case = fixture.case(what);
        let ours = case.predict(&mut unet);
        let (torch, plain) = (
            support::relative_error(&ours, case.output),
            support::relative_error(&ours, &untouched(&fixture.model(), &case)),
        );
        println!("{what}: {torch:e} from PyTorch, {plain:e} from the untouched model");
        assert!(torch < 1e-4 && plain < 1e-5, "{what}: {torch:e} from PyTorch, {plain:e} from the untouched model");
    }
}

#[test]
fn a_composition_shuts_the_weights_and_its_removal_leaves_no_trace() {
    let fixture = Fixture::new("text");
    let mut unet = fixture.open(2);
    let (plain, composed) = (fixture.case("plain"), fixture.case("composed"));
    let first = plain.predict(&mut unet);
    let composition = |unet: &Unet| {
        let neurons = fixture.neurons(&["sets"]);
        let concept = GatheredConcept::from_neurons(&neurons, unet.projections().unwrap(), unet.pool()).unwrap();
        let mut composition = Composition::new();
        composition.push(concept, 1.0, Rows::All).unwrap();
        composition
    };
    unet.set_composition(composition(&unet)).unwrap();
    let second = composed.again(&mut unet).unwrap();
    let error = support::relative_error(&second, composed.output);
    let moved = support::relative_error(&first, composed.output);
    println!("composed: {error:e} from PyTorch with the weights set to zero, which moved it by {moved:e}");
    assert!(error < 1e-4 && moved > 1e-3);
    unet.set_composition(Composition::new()).unwrap();
    assert_eq!(plain.again(&mut unet).unwrap(), first);
    // The same on a fresh UNet with other threads, and with the composition set before the prompt.
    let mut other = fixture.open(5);
    other.set_composition(composition(&other)).unwrap();
    assert_eq!(composed.predict(&mut other), second);
    other.set_composition(Composition::new()).unwrap();
    assert_eq!(plain.again(&mut other).unwrap(), first);
    // A text that is set again keeps its keys and values, one that comes back after another is computed anew.
    other.set_composition(composition(&other)).unwrap();
    assert_eq!(composed.predict(&mut other), second);
    other.set_composition(Composition::new()).unwrap();
    assert_eq!(plain.predict(&mut other), first);
    let elsewhere = fixture.case("other sizes");
    assert!(support::relative_error(&elsewhere.predict(&mut other), elsewhere.output) < 1e-4);
    assert_eq!(plain.predict(&mut other), first);
}

/// Weights of self-attention are inputs where they were asked for, and shut with the others.
#[test]
fn weights_of_self_attention_are_composed_where_they_were_asked_for() {
    let fixture = Fixture::new("text");
    let (plain, composed) = (fixture.case("plain"), fixture.case("composed, with self-attention"));
    let neurons = fixture.neurons(&["sets", "self_sets"]);
    let gather = |unet: &Unet| GatheredConcept::from_neurons(&neurons, unet.projections().unwrap(), unet.pool());
    let unasked = fixture.open(2);
    let error = gather(&unasked).err().unwrap();
    assert!(error.message().contains("self-attention"), "{error}");

    let mut unet = fixture.open_with(2, true);
    let first = plain.predict(&mut unet);
    assert!(support::relative_error(&first, plain.output) < 1e-4);
    let composition = |unet: &Unet, strength: f32| {
        let mut composition = Composition::new();
        composition.push(gather(unet).unwrap(), strength, Rows::All).unwrap();
        composition
    };
    unet.set_composition(composition(&unet, 1.0)).unwrap();
    let error = support::relative_error(&composed.again(&mut unet).unwrap(), composed.output);
    println!("composed: {error:e} from PyTorch with the weights set to zero");
    assert!(error < 1e-4, "{error:e} from PyTorch");
    // Two concepts that share half of what they take away shut the whole of it.
    let mut twice = composition(&unet, 1.0);
    twice.push(gather(&unet).unwrap(), 0.5, Rows::All).unwrap();
    unet.set_composition(twice).unwrap();
    assert!(support::relative_error(&composed.again(&mut unet).unwrap(), composed.output) < 1e-4);
    unet.set_composition(composition(&unet, 0.5)).unwrap();
    assert!(support::relative_error(&composed.again(&mut unet).unwrap(), composed.output) > 1e-3);
    unet.set_composition(Composition::new()).unwrap();
    assert_eq!(plain.again(&mut unet).unwrap(), first);

    // In half precision the weights are inputs of the type in which their product is computed.
    let half = Fixture::new("half");
    let case = half.case("plain");
    let error = support::relative_error(&case.predict(&mut half.open_with(2, true)), &case.predict(&mut half.open(2)));
    assert!(error < 1e-2, "half precision: {error:e} apart");
}

#[test]
fn walks_of_every_sampler_agree_with_diffusers() {
    let fixture = Fixture::new("text");
    let mut unet = fixture.open(2);
    let (context, context_shape) = fixture.part(&fixture.cases["context"]);
    let conditioning = Conditioning {
        batch: context_shape[0],
        tokens: context_shape[1],
        context: context.to_vec(),
        class_labels: Some(vec![1, 3]),
        ..Conditioning::default()
    };
    let shape = [2, 4, 8, 8];
    let len = shape.iter().product::<usize>();
    let walks = fixture.cases["walks"].as_array().unwrap();
    assert_eq!(walks.len(), 6);
    for case in walks {
        let config = SchedulerConfig::from_json(case["config"].to_string().as_bytes(), None).unwrap();
        let options = PlanOptions { eta: case["eta"].as_f64().unwrap(), ..PlanOptions::new(25) };
        let (noises, states) = (fixture.part(&case["noises"]).0, fixture.part(&case["states"]).0);
        let mut given = |step: usize, out: &mut [f32]| out.copy_from_slice(&noises[step * len..(step + 1) * len]);
        let mut worst = 0.0_f64;
        let mut on_step = |report: &StepReport<'_>| {
            let expected = &states[report.step * len..(report.step + 1) * len];
            worst = worst.max(support::relative_error(report.state, expected));
            std::ops::ControlFlow::Continue(())
        };
        let walk = Walk {
            shape,
            plan: Plan::new(&config, options).unwrap().into(),
            stage_class_labels: &[],
            guidance: Guidance { scale: 1.0, rescale: 0.0 },
            conditioning: &conditioning,
            noise: Noise { start: Some(&noises[25 * len..]), step: Some(&mut given), ..Noise::default() },
            clean: None,
            on_step: Some(&mut on_step),
        };
        walk.run(from_mut(&mut unet), &mut Job::default()).unwrap();
        println!("{}: worst state {worst:.1e}", case["config"]["_class_name"]);
        assert!(worst < 1e-4, "{}: {worst:e}", case["config"]);
    }
}

#[test]
fn a_nan_is_named_by_its_step_and_a_cancelled_walk_leaves_no_trace() {
    let fixture = Fixture::new("text");
    let mut unet = fixture.open(1);
    let conditioning = fixture.case("plain").conditioning;
    let config = json!({"_class_name": "DDPMScheduler", "timestep_spacing": "trailing"});
    let config = SchedulerConfig::from_json(config.to_string().as_bytes(), None).unwrap();
    let plan = Plan::new(&config, PlanOptions::new(6)).unwrap();
    let walk = |noise| Walk {
        shape: [2, 4, 8, 8],
        plan: plan.clone().into(),
        stage_class_labels: &[],
        guidance: Guidance { scale: 1.0, rescale: 0.0 },
        conditioning: &conditioning,
        noise,
        clean: None,
        on_step: None,
    };
    let seeded = |seed| Noise { seed, ..Noise::default() };
    let first = walk(seeded(7)).run(from_mut(&mut unet), &mut Job::default()).unwrap();
    let mut poisoned = |step: usize, out: &mut [f32]| out.fill(if step == 3 { f32::NAN } else { 0.5 });
    let noise = Noise { step: Some(&mut poisoned), ..seeded(7) };
    let error = walk(noise).run(from_mut(&mut unet), &mut Job::default()).unwrap_err();
    assert_eq!(error.status(), Status::NotFinite);
    assert!(error.message().contains("step 4 of 6"), "{error}");

    for stop in 0..6 {
        let mut on_step = |report: &StepReport<'_>| {
            if report.step == stop { std::ops::ControlFlow::Break(()) } else { std::ops::ControlFlow::Continue(()) }
        };
        let error = Walk { on_step: Some(&mut on_step), ..walk(seeded(7)) }
            .run(from_mut(&mut unet), &mut Job::default())
            .unwrap_err();
        assert_eq!(error.status(), Status::Cancelled);
        let job_token = CancelToken::new();
        let token = job_token.clone();
        let mut on_step = |report: &StepReport<'_>| {
            if report.step == stop {
                token.cancel();
            }
            std::ops::ControlFlow::Continue(())
        };
        let walk_to_cancel = Walk { on_step: Some(&mut on_step), ..walk(seeded(7)) };
        let error = walk_to_cancel.run(from_mut(&mut unet), &mut Job { cancel: job_token, report: None }).unwrap_err();
        assert_eq!(error.status(), Status::Cancelled);
        assert_eq!(walk(seeded(7)).run(from_mut(&mut unet), &mut Job::default()).unwrap(), first);
    }
    assert_ne!(walk(seeded(8)).run(from_mut(&mut unet), &mut Job::default()).unwrap(), first);
    // An image has its own noise, whatever else is in the batch.
    let second = walk(Noise { first_image: 1, ..seeded(7) }).run(from_mut(&mut unet), &mut Job::default()).unwrap();
    assert_ne!(second[..256], first[..256]);
}

#[test]
fn half_precision_models_take_and_give_single_precision() {
    let fixture = Fixture::new("half");
    let mut unet = fixture.open(2);
    for what in ["plain", "other sizes"] {
        let case = fixture.case(what);
        let error = support::relative_error(&case.predict(&mut unet), case.output);
        println!("{what}: {error:e} from single precision");
        assert!(error < 1e-2, "{what}: {error:e}");
    }
}

#[test]
fn bfloat16_models_take_and_give_single_precision() {
    let fixture = Fixture::new("bfloat16");
    let mut unet = fixture.open(2);
    assert_eq!(unet.projections().unwrap().as_slice().len(), 8);
    let types: Vec<_> = unet.session().inputs().map(|port| port.dtype).collect();
    assert_eq!(
        types.iter().filter(|dtype| **dtype == ElementType::BF16).count(),
        1 + 1 + 8,
        "the state, the text, keys and values"
    );
    for what in ["plain", "other sizes"] {
        let case = fixture.case(what);
        let error = support::relative_error(&case.predict(&mut unet), case.output);
        println!("{what}: {error:e} from single precision");
        assert!(error < 1e-2, "{what}: {error:e}");
    }
    // Before opset 22 few operators may compute in bfloat16: an error that names model and operator.
    let native = fixture.folder.join("native/model.onnx");
    let error = Unet::open(&runtime(), &native, &UnetOptions::default()).err().unwrap();
    assert_eq!(error.status(), Status::InvalidFile, "{error}");
    assert!(error.message().contains("native/model.onnx") && error.message().contains("Conv"), "{error}");
}

#[test]
fn a_static_export_takes_its_own_sizes_and_names_them_otherwise() {
    let fixture = Fixture::new("static");
    let mut unet = fixture.open(2);
    let case = fixture.case("plain");
    assert!(support::relative_error(&case.predict(&mut unet), case.output) < 1e-4);
    assert_eq!((unet.shape().batch, unet.shape().height, unet.shape().tokens), (Some(1), Some(8), Some(77)));
    let wide = unet.denoise(&[0.0; 4 * 8 * 16], [1, 4, 8, 16], 1.0, &CancelToken::new()).unwrap_err();
    assert!(wide.message().contains("\"sample\"") && wide.message().contains("[1, 4, 8, 16]"), "{wide}");
    let long = Conditioning { tokens: 154, context: vec![0.0; 154 * 48], ..case.conditioning.clone() };
    let long = unet.set_conditioning(&long).unwrap_err();
    assert!(long.message().contains("encoder_hidden_states") && long.message().contains("77"), "{long}");
    let two = Conditioning { batch: 2, context: vec![0.0; 2 * 77 * 48], ..case.conditioning.clone() };
    assert!(unet.set_conditioning(&two).unwrap_err().message().contains("must be 1"));
    // A refused conditioning leaves none.
    assert_eq!(case.again(&mut unet).unwrap_err().status(), Status::InvalidArgument);
    assert!(support::relative_error(&case.predict(&mut unet), case.output) < 1e-4);
}

#[test]
fn a_unet_without_text_runs_and_refuses_concepts() {
    let fixture = Fixture::new("unconditional");
    let mut unet = fixture.open(2);
    let case = fixture.case("plain");
    assert!(support::relative_error(&case.predict(&mut unet), case.output) < 1e-4);
    assert!(unet.projections().is_none());
    unet.set_composition(Composition::new()).unwrap();
    let text = Conditioning { tokens: 1, context: vec![0.0; 2 * 8], ..case.conditioning.clone() };
    assert!(unet.set_conditioning(&text).unwrap_err().message().contains("takes no text"));
}

#[test]
fn wrong_inputs_are_named_with_what_is_wanted() {
    let fixture = Fixture::new("text");
    let mut unet = fixture.open(1);
    let case = fixture.case("plain");
    let sample = case.sample;
    let cancel = CancelToken::new();
    let refused = |result: Result<Vec<f32>, Error>, named: &[&str]| {
        let error = result.unwrap_err();
        assert_eq!(error.status(), Status::InvalidArgument, "{error}");
        named.iter().for_each(|named| assert!(error.message().contains(named), "{error}"));
    };
    refused(unet.denoise(sample, case.shape, 1.0, &cancel), &["conditioning"]);
    unet.set_conditioning(&case.conditioning).unwrap();
    refused(unet.denoise(sample, [2, 4, 8, 9], 1.0, &cancel), &["\"sample\"", "[2, 4, 8, 9]"]);
    refused(unet.denoise(&sample[..256], [1, 4, 8, 8], 1.0, &cancel), &["\"sample\"", "batch of 1", "2"]);
    refused(unet.denoise(&[0.0; 2 * 3 * 64], [2, 3, 8, 8], 1.0, &cancel), &["\"sample\"", "[2, 3, 8, 8]", "4"]);
    refused(unet.denoise(&[0.0; 2 * 4 * 7 * 8], [2, 4, 7, 8], 1.0, &cancel), &["height", "multiple of 2", "7"]);
    refused(unet.denoise(&[], [0, 4, 8, 8], 1.0, &cancel), &["\"sample\""]);
    refused(unet.denoise(&[], [usize::MAX, 4, 8, 8], 1.0, &cancel), &["\"sample\""]);
    refused(unet.denoise(sample, case.shape, f64::NAN, &cancel), &["\"timestep\""]);

    let base = &case.conditioning;
    let mut refused = |conditioning: Conditioning, named: &[&str]| {
        let error = unet.set_conditioning(&conditioning).unwrap_err();
        assert_eq!(error.status(), Status::InvalidArgument, "{error}");
        named.iter().for_each(|named| assert!(error.message().contains(named), "{error}"));
    };
    refused(Conditioning { batch: 0, ..base.clone() }, &["batch", "at least 1"]);
    refused(Conditioning { tokens: 0, ..base.clone() }, &["encoder_hidden_states"]);
    refused(Conditioning { tokens: 5, ..base.clone() }, &["encoder_hidden_states"]);
    refused(Conditioning { context: vec![0.0; 2 * 77 * 47], ..base.clone() }, &["encoder_hidden_states", "48", "47"]);
    refused(Conditioning { class_labels: None, ..base.clone() }, &["class_labels", "not given"]);
    refused(Conditioning { class_labels: Some(vec![0]), ..base.clone() }, &["class_labels", "1", "2"]);
    refused(Conditioning { time_ids: Some(vec![0.0; 12]), ..base.clone() }, &["time_ids", "no such input"]);

    let cancelled = CancelToken::new();
    cancelled.cancel();
    unet.set_conditioning(base).unwrap();
    assert_eq!(unet.denoise(sample, case.shape, 1.0, &cancelled).unwrap_err().status(), Status::Cancelled);
}
