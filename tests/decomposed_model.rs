//! The shipped model walked by its decomposed process: against its own sampler in Python, and draws against walks that are
//! driven step by step.

mod support;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use macula::Status;
use macula::concept::{GatheredConcept, Indices, Layer, NeuronSet};
use macula::diffusion::decomposed::operators::{Size, down};
use macula::diffusion::decomposed::{Decomposition, Plan, Schedule, Trajectory};
use macula::diffusion::guidance::{Guidance, StepReport};
use macula::diffusion::noise::standard_normal;
use macula::diffusion::pipeline::{AppliedConcept, ConceptScope, DrawOptions, Expected, Images, Pipeline, Start};
use macula::diffusion::schedule::{PlanOptions, Sampler};
use macula::diffusion::unet::UnetOptions;
use macula::onnx::{Limits, Model};
use macula::progress::{CancelToken, Job};
use macula::runtime::{Provider, Runtime, RuntimeOptions, TensorRtOptions};
use serde_json::Value;
use sha2::{Digest, Sha256};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/emoji")
}

fn pipeline() -> Pipeline {
    pipeline_of(&folder().join("onnx"))
}

fn pipeline_of(folder: &Path) -> Pipeline {
    support::onnxruntime();
    let mut options = UnetOptions::default();
    options.session.intra_threads = 1;
    options.threads = 1;
    Pipeline::open(&Runtime::load(&RuntimeOptions::default()).unwrap(), folder, &options).unwrap()
}

/// A digest of the files that the Python side runs.
fn digest() -> String {
    let mut hash = Sha256::new();
    for file in ["onnx/unet/model.onnx", "onnx/text_encoder/model.onnx", "sampling.py", "network.py"] {
        hash.update(std::fs::read(folder().join(file)).unwrap());
    }
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

fn wholes(value: &Value) -> Vec<usize> {
    value.as_array().unwrap().iter().map(|number| number.as_u64().unwrap() as usize).collect()
}

/// One guided prediction under the label of a stage.
fn predict(
    pipeline: &mut Pipeline,
    prompts: &[String],
    guidance: Guidance,
    label: i64,
    state: &[f32],
    shape: [usize; 4],
    timestep: f64,
) -> Vec<f32> {
    let count = prompts.len();
    let mut texts = vec![String::new(); count];
    texts.extend_from_slice(prompts);
    let cancel = CancelToken::new();
    let (conditioning, _) = pipeline.condition(&texts, label, (64, 64), &cancel).unwrap();
    let doubled = [2 * shape[0], shape[1], shape[2], shape[3]];
    let both = [state, state].concat();
    let both = pipeline.denoise(&both, doubled, timestep, 0, &conditioning, count, None, &cancel).unwrap();
    guidance.combine(&both[..state.len()], &both[state.len()..], count).unwrap()
}

#[test]
fn every_state_agrees_with_the_models_own_sampler() {
    let made = support::fixture("decomposed.py", &[&digest()]);
    let walk: Value = serde_json::from_slice(&std::fs::read(made.join("walk.json")).unwrap()).unwrap();
    let values = support::read_f32(made.join("values.f32"));
    let mut rest = &values[..];
    let mut parts = walk["shapes"].as_array().unwrap().iter().map(|shape| {
        let (part, after) = rest.split_at(wholes(shape).iter().product());
        rest = after;
        part
    });
    let prompts: Vec<String> =
        walk["prompts"].as_array().unwrap().iter().map(|prompt| prompt.as_str().unwrap().to_owned()).collect();
    let guidance = Guidance { scale: walk["guidance"].as_f64().unwrap(), rescale: 0.0 };
    let mut pipeline = pipeline();
    let schedule = pipeline.schedule().unwrap().clone();
    let steps = PlanOptions::new(walk["steps"].as_u64().unwrap() as usize);
    let plan = Plan::new(&schedule, steps).unwrap();
    let timesteps: Vec<usize> = plan.steps().iter().map(|step| step.timestep() as usize).collect();
    assert_eq!(timesteps, wholes(&walk["timesteps"]));
    let labels: Vec<usize> =
        plan.steps().iter().map(|step| schedule.class_label(step.stage).unwrap() as usize).collect();
    assert_eq!(labels, wholes(&walk["labels"]));
    let mut trajectory = Trajectory::new(plan, [prompts.len(), 3, 64, 64]).unwrap();
    let mut state = trajectory.begin(parts.next().unwrap(), None).unwrap();
    let mut lifts: Vec<&[f32]> = (0..2).map(|_| parts.next().unwrap()).collect();
    let mut worst = 0.0_f64;
    while let Some((index, step)) = trajectory.current() {
        let error = support::relative_error(&state, parts.next().unwrap());
        assert!(error < 1e-4, "the state before step {index} differs by {error:e}");
        worst = worst.max(error);
        let (label, timestep) = (schedule.class_label(step.stage).unwrap(), step.timestep());
        let lift = step.lift.map(|_| lifts.remove(0));
        let shape = trajectory.shape();
        let prediction = predict(&mut pipeline, &prompts, guidance, label, &state, shape, timestep);
        trajectory.step(&mut state, &prediction, None, lift).unwrap();
    }
    let drawn = Images::from_planes(&state, [prompts.len(), 3, 64, 64]).unwrap();
    let far = drawn.rgb.iter().zip(parts.next().unwrap()).map(|(a, b)| (f32::from(*a) - b).abs()).fold(0.0, f32::max);
    // What lies near the middle between two bytes may be rounded to either.
    assert!(far <= 1.0, "a pixel differs by {far} of 255");
    println!("{} states, worst relative error {worst:.1e}, worst pixel {far} of 255", timesteps.len());
}

fn normal(seed: u64, step: u32, shape: [usize; 4]) -> Vec<f32> {
    let one: usize = shape[1..].iter().product();
    let mut values = vec![0.0; shape[0] * one];
    values.chunks_exact_mut(one).enumerate().for_each(|(image, out)| standard_normal(seed, image as u32, step, out));
    values
}

fn options(schedule: &Schedule) -> DrawOptions<'_> {
    let mut options = DrawOptions::new("a tiger on a blue background");
    options.images_per_prompt = 2;
    options.steps = 6;
    options.guidance = Guidance { scale: 3.0, rescale: 0.0 };
    options.seed = 11;
    options.schedule = Some(schedule);
    options
}

#[test]
fn a_draw_is_the_walk_driven_step_by_step_with_one_noise_of_full_size() {
    let mut pipeline = pipeline();
    let trained = pipeline.schedule().unwrap().clone();
    let ordinary = ordinary(&trained);
    for (schedule, sampler, eta) in [
        (&trained, None, 0.5),
        (&trained, Some(Sampler::Ddpm), 0.0),
        (&trained, Some(Sampler::DpmMultistep), 0.0),
        (&ordinary, None, 0.5),
        (&ordinary, Some(Sampler::DpmMultistep), 0.0),
    ] {
        let mut options = options(schedule);
        (options.sampler, options.eta) = (sampler, eta);
        let mut states: Vec<(Vec<f32>, [usize; 4])> = Vec::new();
        let mut on_step = |report: &StepReport<'_>| {
            assert_eq!(report.clean.len(), report.clean_shape.iter().product::<usize>());
            states.push((report.state.to_vec(), report.shape));
            ControlFlow::Continue(())
        };
        pipeline.draw(&options, Some(&mut on_step), &mut Job::default()).unwrap();
        let walked = sampler.map_or(schedule.clone(), |sampler| schedule.with_sampler(sampler).unwrap());
        let plan = Plan::new(&walked, PlanOptions { eta, ..PlanOptions::new(options.steps) }).unwrap();
        let shape = [2, 3, 64, 64];
        let at = |level: usize| Size { planes: 6, height: 64 >> level, width: 64 >> level };
        let mut trajectory = Trajectory::new(plan, shape).unwrap();
        let start = |stage| (0..stage).fold(normal(11, 0, shape), |noise, level| down(&noise, at(level)).unwrap());
        let mut state = trajectory.begin(&start(trajectory.stage()), None).unwrap();
        let prompts = vec![options.prompts[0].clone(); 2];
        while let Some((index, step)) = trajectory.current() {
            let (shape, stage) = (trajectory.shape(), step.stage);
            let label = schedule.class_label(stage).unwrap();
            let noise = step.needs_noise().then(|| normal(11, index as u32 + 1, shape));
            let lift = step.lift.map(|_| start(stage - 1));
            let timestep = step.timestep();
            let input = trajectory.model_input(&state).unwrap();
            let prediction = predict(&mut pipeline, &prompts, options.guidance, label, &input, shape, timestep);
            trajectory.step(&mut state, &prediction, noise.as_deref(), lift.as_deref()).unwrap();
            assert_eq!(states[index].1, trajectory.shape());
            assert_eq!(states[index].0, state, "{sampler:?}: after step {index}");
        }
        assert_eq!(states.len(), trajectory.plan().steps().len());
    }
}

/// The shipped UNet as two ordinary models: of pictures of 64 and of 32 pixels.
fn ordinary(trained: &Schedule) -> Schedule {
    let decomposition = Decomposition {
        turning_points: vec![500],
        stage_class_labels: vec![0, 4],
        ordinary_models: true,
        ..Decomposition::default()
    };
    trained.with_decomposition(decomposition).unwrap()
}

#[test]
fn an_ordinary_model_of_half_the_size_sees_what_the_noise_leaves() {
    let mut pipeline = pipeline();
    let schedule = ordinary(pipeline.schedule().unwrap());
    let untold = Decomposition { ordinary_models: false, ..schedule.decomposition().clone() };
    let untold = schedule.with_decomposition(untold).unwrap();
    let mut options = options(&schedule);
    (options.schedule, options.guidance.scale, options.steps) = (None, 1.0, 25);
    let picture = pipeline.draw(&options, None, &mut Job::default()).unwrap();
    let (clean, _) = pipeline.encode_images(&picture, &CancelToken::new()).unwrap();
    let means: Vec<f32> =
        down(&clean, Size { planes: 6, height: 64, width: 64 }).unwrap().iter().map(|x| x / 2.0).collect();
    // Root mean square error of the picture that is predicted from time 520.
    let mut error = |schedule: &Schedule| {
        let mut options = options.clone();
        (options.schedule, options.start) = (Some(schedule), Start::Images { images: &picture, step: 12 });
        let mut squares = 0.0;
        let mut on_step = |report: &StepReport<'_>| {
            assert_eq!(report.clean_shape, [2, 3, 32, 32]);
            squares = report.clean.iter().zip(&means).map(|(a, b)| f64::from(a - b).powi(2)).sum();
            ControlFlow::Break(())
        };
        assert!(pipeline.draw(&options, Some(&mut on_step), &mut Job::default()).is_err());
        (squares / means.len() as f64).sqrt()
    };
    let (told, not_told) = (error(&schedule), error(&untold));
    println!("error {told:.3} at the effective timestep, {not_told:.3} at the schedule's own");
    assert!(told < 0.15 && told < 0.8 * not_told, "{told} and {not_told}");
}

/// The shipped folder with a UNet of its own for stage 1.
fn folder_with_second_unet(unet: &Path) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for part in std::fs::read_dir(self::folder().join("onnx")).unwrap() {
        let part = part.unwrap();
        std::os::unix::fs::symlink(part.path(), folder.path().join(part.file_name())).unwrap();
    }
    std::os::unix::fs::symlink(unet, folder.path().join("unet_1")).unwrap();
    folder
}

/// A concept of every fifth weight.
fn every_fifth(pipeline: &Pipeline) -> AppliedConcept {
    let projections = pipeline.unet().projections().unwrap().clone();
    let layers = projections.as_slice().iter().map(|one| {
        let weights = one.out_features * one.in_features;
        let every_fifth = (0..weights as u32).step_by(5).collect();
        let indices = Indices::from_sorted(weights as u32, every_fifth).unwrap();
        Layer::new(&one.path, one.out_features, one.in_features, indices).unwrap()
    });
    let neurons = NeuronSet::new(layers.collect()).unwrap();
    let concept = GatheredConcept::from_neurons(&neurons, &projections, pipeline.unet().pool()).unwrap();
    AppliedConcept { concept, strength: 1.0, scope: ConceptScope::Global, token: None }
}

#[test]
fn stages_may_have_unets_of_their_own() {
    let mut one = pipeline();
    let schedule = one.schedule().unwrap().clone();
    let options = options(&schedule);
    let draw = |pipeline: &mut Pipeline, options: &DrawOptions<'_>| pipeline.draw(options, None, &mut Job::default());
    let base = draw(&mut one, &options).unwrap();
    let concept = every_fifth(&one);
    one.set_concepts(vec![concept]).unwrap();
    let composed = draw(&mut one, &options).unwrap();

    // The same weights twice: the same pictures, and concepts act in both.
    let twins = folder_with_second_unet(&folder().join("onnx/unet"));
    let mut two = pipeline_of(twins.path());
    assert_eq!((one.info().unets, two.info().unets), (1, 2));
    assert_eq!(draw(&mut two, &options).unwrap(), base);
    assert!(two.memory().weights > one.memory().weights);
    // The weights that concepts act on are held once, keys and values for each.
    let weights = one.unet().projections().unwrap().memory_bytes();
    let added = two.composing_bytes() - one.composing_bytes();
    assert!(added > 0 && added < weights, "{added} of {weights} bytes");
    let concept = every_fifth(&two);
    two.set_concepts(vec![concept]).unwrap();
    assert_eq!(draw(&mut two, &options).unwrap(), composed);

    // Keys of zeros in the second one: stages 1 and 2 draw otherwise, stage 0 does not.
    let other = tempfile::tempdir().unwrap();
    let mut model = Model::open(folder().join("onnx/unet/model.onnx"), &Limits::default()).unwrap();
    let graph = model.graph_mut();
    let keys = graph.initializer.iter_mut().find(|tensor| tensor.name().ends_with("attn2.to_k.weight")).unwrap();
    keys.raw_data = Some(vec![0; keys.raw_data().len()].into());
    std::fs::write(other.path().join("model.onnx"), model.to_bytes().unwrap()).unwrap();
    let strangers = folder_with_second_unet(other.path());
    let mut two = pipeline_of(strangers.path());
    two.check_schedule(&schedule, None, None, 2, &CancelToken::new()).unwrap();
    assert_ne!(draw(&mut two, &options).unwrap(), base);
    let mut plain = options.clone();
    plain.schedule = None;
    one.set_concepts(Vec::new()).unwrap();
    assert_eq!(draw(&mut two, &plain).unwrap(), draw(&mut one, &plain).unwrap());
    // Concepts are of the first one's weights: they act where it draws alone, and nowhere else.
    let concept = every_fifth(&two);
    two.set_concepts(vec![concept]).unwrap();
    let error = draw(&mut two, &options).unwrap_err();
    assert!(error.message().contains("unet_1, which serves stage 1, has others"), "{error}");
    draw(&mut two, &plain).unwrap();
}

#[test]
fn single_steps_are_predicted_by_the_unet_of_their_stage() {
    let twins = folder_with_second_unet(&folder().join("onnx/unet"));
    let mut pipeline = pipeline_of(twins.path());
    let cancel = CancelToken::new();
    let (conditioning, _) = pipeline.condition(&["a tiger".to_owned()], 2, (64, 64), &cancel).unwrap();
    let state = normal(3, 0, [1, 3, 32, 32]);
    let mut step =
        |stage| pipeline.denoise(&state, [1, 3, 32, 32], 500.0, stage, &conditioning, 0, None, &cancel).unwrap();
    let first = step(0);
    for stage in [1, 2, 0, 1] {
        assert_eq!(step(stage), first);
    }
}

#[test]
fn concepts_cancelling_and_a_later_start_work_in_a_decomposed_draw() {
    let mut pipeline = pipeline();
    let schedule = pipeline.schedule().unwrap().clone();
    let mut options = options(&schedule);
    let base = pipeline.draw(&options, None, &mut Job::default()).unwrap();
    let concept = every_fifth(&pipeline);
    pipeline.set_concepts(vec![concept]).unwrap();
    assert_ne!(pipeline.draw(&options, None, &mut Job::default()).unwrap(), base);
    pipeline.set_concepts(Vec::new()).unwrap();
    assert_eq!(pipeline.draw(&options, None, &mut Job::default()).unwrap(), base);

    let all = Plan::new(&schedule, PlanOptions::new(options.steps)).unwrap().steps().len();
    for stop in [0, 2, all - 1] {
        let mut on_step = |report: &StepReport<'_>| {
            if report.step == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let error = pipeline.draw(&options, Some(&mut on_step), &mut Job::default()).unwrap_err();
        assert_eq!(error.status(), Status::Cancelled);
    }
    assert_eq!(pipeline.draw(&options, None, &mut Job::default()).unwrap(), base);

    // From the picture itself: the later the start, the closer the result.
    let distance = |other: &Images| -> f64 {
        base.rgb.iter().zip(&other.rgb).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>()
    };
    options.seed = 12;
    options.start = Start::Images { images: &base, step: all - 1 };
    let mut first = None;
    let mut on_step = |report: &StepReport<'_>| {
        first.get_or_insert((report.step, report.shape));
        ControlFlow::Continue(())
    };
    let close = distance(&pipeline.draw(&options, Some(&mut on_step), &mut Job::default()).unwrap());
    assert_eq!(first, Some((all - 1, [2, 3, 64, 64])));
    options.start = Start::Images { images: &base, step: 1 };
    let far = distance(&pipeline.draw(&options, None, &mut Job::default()).unwrap());
    assert!(close < far, "{close} from the last step, {far} from the second");
    options.start = Start::Images { images: &base, step: all };
    let error = pipeline.draw(&options, None, &mut Job::default()).unwrap_err();
    assert!(error.message().contains(&format!("start step is {all}")), "{error}");
}

#[test]
fn class_labels_are_refused_for_a_model_without_classes() {
    let folder = support::fixture("pipelines.py", &["pixel"]).join("model");
    let mut pipeline = pipeline_of(&folder);
    let text = std::fs::read(folder.join("scheduler/scheduler_config.json")).unwrap();
    let mut scheduler: serde_json::Map<String, Value> = serde_json::from_slice(&text).unwrap();
    scheduler.insert("_class_name".to_owned(), "DDIMScheduler".into());
    let decomposition =
        Decomposition { turning_points: vec![500], stage_class_labels: vec![1, 2], ..Decomposition::default() };
    let labelled = Schedule::new(scheduler, decomposition).unwrap();
    let error = pipeline.check_schedule(&labelled, None, None, 1, &CancelToken::new()).unwrap_err();
    assert!(error.message().contains("this UNet takes no class"), "{error}");
    let unlabelled = Decomposition { stage_class_labels: Vec::new(), ..labelled.decomposition().clone() };
    let unlabelled = labelled.with_decomposition(unlabelled).unwrap();
    pipeline.check_schedule(&unlabelled, None, None, 1, &CancelToken::new()).unwrap();
}

/// TensorRT is not on this machine: its options are made, then the CPU takes over.
#[test]
fn what_is_expected_of_tensorrt_is_known_before_a_session_is_made() {
    support::onnxruntime();
    let mut options = UnetOptions::default();
    options.session.provider = Provider::TensorRt(TensorRtOptions::default());
    options.session.fallback = true;
    let runtime = Runtime::load(&RuntimeOptions::default()).unwrap();
    let expected = Expected { pictures: 4, stages: 3 };
    let pipeline = Pipeline::open_expecting(&runtime, folder().join("onnx"), &options, expected).unwrap();
    assert!(pipeline.unet().session().fallback_reason().unwrap().contains("TensorRT"));
}

#[test]
fn a_schedule_that_does_not_fit_is_refused_before_the_first_step() {
    let mut pipeline = pipeline();
    let schedule = pipeline.schedule().unwrap().clone();
    pipeline.check_schedule(&schedule, None, None, 2, &CancelToken::new()).unwrap();
    let with = |turning_points: &[usize], stage_sizes: &[usize]| {
        let decomposition = Decomposition {
            turning_points: turning_points.to_vec(),
            stage_sizes: stage_sizes.to_vec(),
            ..Decomposition::default()
        };
        schedule.with_decomposition(decomposition).unwrap()
    };
    let of_json = |text: &str| Schedule::from_json(text.as_bytes()).unwrap();
    for (schedule, named) in [
        // 64, 32, 16, 8, 4: no UNet with two halvings and folded pixels takes the last.
        (with(&[200, 400, 600, 800], &[]), "stage 4 of the schedule, 4 x 4"),
        (with(&[200, 300, 400, 500, 600, 700, 800], &[]), "2^7"),
        (with(&[500], &[32, 16]), "32 x 32"),
        (of_json(r#"{"turning_points": [500], "prediction_type": "v_prediction"}"#), "another model's"),
        (of_json(r#"{"turning_points": [500], "beta_schedule": "squaredcos_cap_v2"}"#), "prediction_type"),
    ] {
        let mut steps = 0;
        let mut on_step = |_: &StepReport<'_>| {
            steps += 1;
            ControlFlow::Continue(())
        };
        let error = pipeline.draw(&options(&schedule), Some(&mut on_step), &mut Job::default()).unwrap_err();
        assert_eq!((error.status(), steps), (Status::InvalidArgument, 0), "{error}");
        assert!(error.message().contains(named), "{error}");
        let error = pipeline.check_schedule(&schedule, None, None, 2, &CancelToken::new()).unwrap_err();
        assert!(error.message().contains(named), "{error}");
    }
    let mut karras = options(&schedule);
    karras.karras = Some(true);
    assert!(pipeline.draw(&karras, None, &mut Job::default()).unwrap_err().message().contains("Karras"));
}
