//! Every sampler against diffusers, state by state, over a closed-form model; and what configurations are refused.

mod support;

use macula::Status;
use macula::diffusion::decomposed::Trajectory;
use macula::diffusion::schedule::{Plan, PlanOptions, Sampler, SchedulerConfig};
use serde_json::{Value, json};

/// The model of `schedulers.py`.
fn model(x: &[f32], t: f64) -> Vec<f32> {
    x.iter().map(|x| f64::from(*x)).map(|x| (0.3 * x + 0.5 * (3.0 * x + t / 100.0).sin() - 0.2) as f32).collect()
}

#[test]
fn every_state_agrees_with_diffusers() {
    let folder = support::fixture("schedulers.py", &[]);
    let cases: Value = serde_json::from_slice(&std::fs::read(folder.join("cases.json")).unwrap()).unwrap();
    let values = support::read_f32(folder.join("states.f32"));
    let count = cases["count"].as_u64().unwrap() as usize;
    let part = |offset: usize| &values[offset..offset + count];
    let (start_noise, clean) = (part(0), part(count));
    let noise = |step: usize| part((2 + step) * count);
    let mut worst = (0.0, String::new());
    let mut failures = Vec::new();
    let cases = cases["cases"].as_array().unwrap();
    assert!(cases.len() > 700, "{} walks", cases.len());
    for case in cases {
        let config = SchedulerConfig::from_json(case["config"].to_string().as_bytes(), None)
            .unwrap_or_else(|e| panic!("{}: {e}", case["config"]));
        let draw = &case["draw"];
        let start = draw["start"].as_u64().unwrap_or(0) as usize;
        let options = PlanOptions {
            steps: draw["steps"].as_u64().unwrap() as usize,
            start,
            eta: draw["eta"].as_f64().unwrap_or(0.0),
        };
        let mut name = case["config"].clone();
        name.as_object_mut().unwrap().remove("trained_betas");
        let name = format!("{name} {draw}");
        let plan = Plan::new(&config, options).unwrap_or_else(|e| panic!("{name}: {e}"));
        let timesteps: Vec<f64> = plan.steps[start..].iter().map(|step| step.timestep).collect();
        let expected: Vec<f64> = case["timesteps"].as_array().unwrap().iter().map(|t| t.as_f64().unwrap()).collect();
        assert_eq!(timesteps.len(), expected.len(), "{name}");
        for (ours, theirs) in timesteps.iter().zip(&expected) {
            // Interpolated timesteps go through single-precision logarithms there.
            assert!((ours - theirs).abs() <= 2e-3, "{name}: timesteps {timesteps:?} against {expected:?}");
        }
        let offset = case["offset"].as_u64().unwrap() as usize;
        let mut walk = Trajectory::new(plan.into(), [2, 3, 4, 4]).unwrap();
        let mut sample = walk.begin(start_noise, (start > 0).then_some(clean)).unwrap();
        for step in 0..=timesteps.len() {
            let error = support::relative_error(&sample, part(offset + step * count));
            if error > 1e-4 {
                failures.push(format!("{name}: state {step} differs by {error:e}"));
            }
            if error > worst.0 {
                worst = (error, format!("{name}: state {step}"));
            }
            if let Some((index, step)) = walk.current() {
                let prediction = model(&walk.model_input(&sample).unwrap(), step.timestep());
                walk.step(&mut sample, &prediction, Some(noise(index)), None).unwrap();
            }
        }
    }
    assert!(failures.is_empty(), "{} states differ:\n{}", failures.len(), failures.join("\n"));
    println!("{} walks, worst relative error {:e} at {}", cases.len(), worst.0, worst.1);
}

#[test]
fn unhandled_and_wrong_fields_are_named() {
    let refused = [
        (json!({"_class_name": "PNDMScheduler"}), Status::Unsupported, "PNDMScheduler"),
        (json!({"_class_name": "DDIMScheduler", "thresholding": true}), Status::Unsupported, "thresholding"),
        (json!({"_class_name": "DDIMScheduler", "beta_schedule": "sigmoid"}), Status::Unsupported, "sigmoid"),
        (json!({"_class_name": "DDIMScheduler", "prediction_type": "flow"}), Status::Unsupported, "flow"),
        (json!({"_class_name": "DDIMScheduler", "timestep_spacing": "odd"}), Status::Unsupported, "odd"),
        (json!({"_class_name": "DDPMScheduler", "variance_type": "learned"}), Status::Unsupported, "learned"),
        (
            json!({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": true}),
            Status::Unsupported,
            "use_beta_sigmas",
        ),
        (
            json!({"_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"}),
            Status::Unsupported,
            "log_linear",
        ),
        (
            json!({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}),
            Status::Unsupported,
            "continuous",
        ),
        (
            json!({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}),
            Status::Unsupported,
            "sde-dpmsolver++",
        ),
        (json!({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}), Status::Unsupported, "solver_order"),
        (
            json!({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": true}),
            Status::Unsupported,
            "use_flow_sigmas",
        ),
        (json!({"_class_name": "DDIMScheduler", "beta_end": 1.5}), Status::InvalidFile, "beta_end"),
        (json!({"_class_name": "DDIMScheduler", "beta_end": "x"}), Status::InvalidFile, "beta_end"),
        (json!({"_class_name": "DDIMScheduler", "clip_sample": 1}), Status::InvalidFile, "clip_sample"),
        (json!({"_class_name": "DDIMScheduler", "num_train_timesteps": 0}), Status::InvalidFile, "num_train_timesteps"),
        (
            json!({"_class_name": "DDIMScheduler", "num_train_timesteps": 1_000_000_000}),
            Status::InvalidFile,
            "num_train_timesteps",
        ),
        (json!({"_class_name": "DDIMScheduler", "trained_betas": [0.1, 0.2]}), Status::InvalidFile, "trained_betas"),
        (json!({}), Status::InvalidFile, "_class_name"),
        (json!([1]), Status::InvalidFile, "object"),
    ];
    for (config, status, named) in refused {
        let error = SchedulerConfig::from_json(config.to_string().as_bytes(), None).unwrap_err();
        assert_eq!(error.status(), status, "{config}: {error}");
        assert!(error.message().contains(named), "{config}: {error}");
    }
    assert_eq!(SchedulerConfig::from_json(b"{", None).unwrap_err().status(), Status::InvalidFile);
}

#[test]
fn another_sampler_reads_the_fields_of_a_foreign_class() {
    let text = json!({
        "_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
        "set_alpha_to_one": false, "steps_offset": 1, "skip_prk_steps": true, "trained_betas": null
    });
    for sampler in Sampler::ALL {
        let config = SchedulerConfig::from_json(text.to_string().as_bytes(), Some(sampler)).unwrap();
        assert_eq!(config.sampler, sampler);
        Plan::new(&config, PlanOptions::new(20)).unwrap();
    }
}

#[test]
fn plans_outside_their_ranges_are_refused() {
    let read = |fields: Value| SchedulerConfig::from_json(fields.to_string().as_bytes(), None).unwrap();
    let ddim = read(json!({"_class_name": "DDIMScheduler"}));
    let refused = |config: &SchedulerConfig, options: PlanOptions, named: &str| {
        let error = Plan::new(config, options).unwrap_err();
        assert!(error.message().contains(named), "{error}");
        error.status()
    };
    let base = PlanOptions::new(10);
    assert_eq!(refused(&ddim, PlanOptions::new(0), "1..=1000"), Status::InvalidArgument);
    assert_eq!(refused(&ddim, PlanOptions::new(1001), "1..=1000"), Status::InvalidArgument);
    assert_eq!(refused(&ddim, PlanOptions { start: 10, ..base }, "0..10"), Status::InvalidArgument);
    assert_eq!(refused(&ddim, PlanOptions { eta: f64::NAN, ..base }, "eta"), Status::InvalidArgument);
    assert_eq!(refused(&ddim, PlanOptions { eta: 1.5, ..base }, "eta"), Status::InvalidArgument);
    let euler = read(json!({"_class_name": "EulerDiscreteScheduler"}));
    assert_eq!(refused(&euler, PlanOptions { eta: 0.5, ..base }, "EulerDiscreteScheduler"), Status::InvalidArgument);
    let lcm = read(json!({"_class_name": "LCMScheduler"}));
    assert_eq!(refused(&lcm, PlanOptions::new(51), "original_inference_steps"), Status::InvalidArgument);
    let offset = read(json!({"_class_name": "DDIMScheduler", "steps_offset": 1}));
    assert_eq!(refused(&offset, PlanOptions::new(1000), "1000"), Status::InvalidArgument);
    let no_signal = read(json!({
        "_class_name": "DDIMScheduler", "rescale_betas_zero_snr": true, "timestep_spacing": "trailing"
    }));
    assert_eq!(refused(&no_signal, base, "zero terminal SNR"), Status::Unsupported);
}

#[test]
fn a_walk_checks_what_it_is_given() {
    let config = SchedulerConfig::from_json(br#"{"_class_name": "DDPMScheduler"}"#, None).unwrap();
    let plan = Plan::new(&config, PlanOptions::new(2)).unwrap();
    let mut walk = Trajectory::new(plan.into(), [1, 1, 2, 2]).unwrap();
    assert!(walk.begin(&[0.0; 4], Some(&[0.0; 3])).is_err());
    let mut sample = vec![0.5; 4];
    assert!(walk.step(&mut sample, &[0.0; 3], Some(&[0.0; 4]), None).unwrap_err().message().contains("prediction"));
    assert!(walk.step(&mut sample, &[0.0; 4], None, None).unwrap_err().message().contains("noise"));
    walk.step(&mut sample, &[0.0; 4], Some(&[0.0; 4]), None).unwrap();
    walk.step(&mut sample, &[0.0; 4], Some(&[0.0; 4]), None).unwrap();
    assert!(walk.current().is_none());
    assert_eq!(walk.step(&mut sample, &[0.0; 4], None, None).unwrap_err().status(), Status::InvalidArgument);
}
