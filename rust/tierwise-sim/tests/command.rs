//! The built command: exit codes, streams, equal bytes.

use std::process::{Command, Output};

fn sim(args: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tierwise-sim")).args(args.split_whitespace()).output().unwrap()
}

fn json(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

const GOLDEN: [(&str, u64); 4] = [
    (
        "run --model llama2-7b --micro-batch 4 --device-budget 30GB --host-budget 250GB --clip-mode speculate --format json",
        0x2988_d41a_cb2f_75df,
    ),
    ("run --model llama2-70b --hardware dgx-a100-40 --gpus 512 --tokens-per-step 4194304 --format json", 0x7ee1_6588_81ae_0f90),
    (
        "run --model gpt2-xl --hardware dgx-h100 --gpus 8 --seq 1024 --pipeline 4 --zero 1 --tokens-per-step 65536 --format json",
        0x543d_7904_023d_97be,
    ),
    ("run --model llama2-7b --micro-batch 4 --policy zero2-offload --pageable --format json", 0x3cac_9ee5_9081_1083),
];

const RUN: &str = "run --model llama2-7b --hardware h100 --seq 4096 --micro-batch 4 --tokens-per-step 16384";

#[test]
fn a_calibrated_file_is_a_machine_that_runs() {
    let folder = std::env::temp_dir().join(format!("tierwise-sim-calibrate-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let file = folder.join("host.json");
    let output = sim(&format!("calibrate --out {} --name here --base a100-80 --host-numel 200000 --seconds 1", file.display()));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(log.contains("not measured: the device") && log.contains("`a100-80`"), "{log}");
    let written: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    let rows = written["measured"]["host"].as_array().unwrap();
    assert_eq!(rows[0]["threads"], 1);
    assert_eq!(rows[rows.len() - 1]["adam_params_per_s"], written["host_adam_params_per_s"]);
    let report = json(&sim(&format!("run --model llama2-7b --hardware {} --format json", file.display())));
    assert_eq!(report["asked"]["hardware"], "here");
    // A figure that cannot be is refused by name.
    let mut wrong = written;
    wrong["measured"]["host"][0]["adam_params_per_s"] = serde_json::json!(0.0);
    std::fs::write(&file, wrong.to_string()).unwrap();
    let refused = sim(&format!("run --model llama2-7b --hardware {}", file.display()));
    std::fs::remove_dir_all(&folder).unwrap();
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8(refused.stderr).unwrap().contains("measured.host.adam_params_per_s is 0"));
}

#[test]
fn a_run_that_fits_exits_with_0() {
    let output = sim(&format!("{RUN} --device-budget 80GB --host-budget 120GB --format json"));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(output.stderr.is_empty());
    let report = json(&output);
    assert_eq!((report["schema_version"].as_u64(), report["fits"].as_bool()), (Some(1), Some(true)));
    assert_eq!(report["asked"]["num_params"], 6_738_415_616_u64);
    assert!(report["mfu"].as_f64().unwrap() < report["hfu"].as_f64().unwrap());
    assert!(report["step"]["device_peak_bytes"].as_u64().unwrap() <= 80_000_000_000);
    let table = String::from_utf8(sim(RUN).stdout).unwrap();
    assert!(table.contains("tokens/s") && table.contains("MFU / HFU"), "{table}");
}

#[test]
fn a_run_that_does_not_fit_exits_with_3_and_says_what_would() {
    let small = format!("{RUN} --device-budget 5GB --host-budget 200GB --format json");
    let output = sim(&small);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let report = json(&output);
    assert_eq!((report["fits"].as_bool(), report["tier"].as_str()), (Some(false), Some("device")));
    assert!(report["shortfall_bytes"].as_u64().unwrap() > 0);
    assert!(report["op"].as_str().unwrap().contains("ward"), "{report}");
    let alternatives = report["alternatives"].as_array().unwrap();
    assert!(!alternatives.is_empty());
    // What it recommends does fit.
    for alternative in alternatives {
        let alternative = alternative.as_str().unwrap();
        let (flag, value) = alternative.split_once(' ').unwrap();
        let changed = small.split_whitespace().collect::<Vec<_>>().windows(2).fold(String::from("run"), |text, pair| match pair {
            [name, _] if *name == flag => format!("{text} {name} {value}"),
            [name, old] if name.starts_with("--") => format!("{text} {name} {old}"),
            _ => text,
        });
        assert_eq!(sim(&changed).status.code(), Some(0), "{changed}");
    }
    let output = sim(&format!("{RUN} --device-budget 30GB --host-budget 10GB"));
    assert_eq!(output.status.code(), Some(3));
    assert!(String::from_utf8(output.stdout).unwrap().contains("of host memory"));
}

#[test]
fn usage_errors_exit_with_2() {
    for (args, says) in [
        ("run", "--model"),
        ("run --model llama9", "known are llama-1.35b"),
        ("run --model llama2-7b --hardware abacus", "known are h100"),
        ("run --model llama2-7b --micro-batch 4 --tokens-per-step 10000", "a multiple of seq * micro-batch = 16384"),
        ("run --model llama2-7b --micro-batch 0", "at least 1"),
        ("run --model llama2-7b --device-budget 80XB", "unknown unit"),
        ("run --model llama2-7b --recompute some", "possible values"),
        ("walk", "unrecognized subcommand"),
    ] {
        let output = sim(args);
        assert_eq!(output.status.code(), Some(2), "{args}: {output:?}");
        assert!(output.stdout.is_empty(), "{args}");
        let log = String::from_utf8(output.stderr).unwrap();
        assert!(log.contains(says), "{args}: {log}");
    }
}

#[test]
fn equal_inputs_give_equal_bytes() {
    let path = |n: u32| std::env::temp_dir().join(format!("tierwise-sim-{}-{n}.json", std::process::id()));
    let once = |n: u32| {
        let file = path(n);
        let args = format!("{RUN} --device-budget 30GB --clip-mode speculate --host-budget 250GB --format json --trace {}", file.display());
        let output = sim(&args);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let trace = std::fs::read(&file).unwrap();
        std::fs::remove_file(&file).unwrap();
        (output.stdout, trace)
    };
    let first = once(0);
    assert!(first == once(1));
    let trace: serde_json::Value = serde_json::from_slice(&first.1).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    for phase in ["M", "X", "C"] {
        assert!(events.iter().any(|e| e["ph"] == phase), "{phase}");
    }
}

/// FNV-1a: stable across platforms and compilers.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[test]
fn results_are_the_recorded_bytes() {
    for (args, expected) in GOLDEN {
        let output = sim(args);
        assert_eq!(output.status.code(), Some(0), "{args}: {output:?}");
        // A change of a result is a change of the simulator: see why, then write the new value here.
        assert_eq!(hash(&output.stdout), expected, "{args}: {:#018x}", hash(&output.stdout));
    }
}

#[test]
fn several_gpus_search_and_compare() {
    let eight = "--model llama2-7b --hardware dgx-h100 --gpus 8 --tokens-per-step 131072 --format json";
    let report = json(&sim(&format!("run {eight} --micro-batch 2 --tensor-parallel 2 --network ethernet-100g")));
    assert_eq!((report["asked"]["data_parallel"].as_u64(), report["asked"]["accumulation"].as_u64()), (Some(4), Some(4)));
    let found = json(&sim(&format!("search {eight}")));
    assert!(found["flags"].as_str().unwrap().contains("--micro-batch"), "{found}");
    // What it recommends gives what it says.
    let flags = found["flags"].as_str().unwrap();
    let again = json(&sim(&format!("run {eight} {flags}")));
    assert_eq!(again["step"]["step_ns"], found["best"]["step"]["step_ns"]);
    let rows = json(&sim(&format!("compare {eight} --micro-batch 2 --policies tierwise,zero3,ddp")));
    let fits: Vec<_> = rows["rows"].as_array().unwrap().iter().map(|r| r["fits"].as_bool().unwrap()).collect();
    assert_eq!(fits, [true, true, false]);
    let none = sim("search --model llama2-70b --hardware rtx4090 --tokens-per-step 4096");
    assert_eq!(none.status.code(), Some(3), "{none:?}");
}

#[test]
fn every_file_of_recorded_runs_passes_its_gate() {
    let folder = format!("{}/validation", env!("CARGO_MANIFEST_DIR"));
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let mut validated = 0;
    for file in files {
        let contents: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
        if contents.get("runs").is_none() {
            // A machine that runs name.
            assert!(contents["name"].is_string(), "{}", file.display());
            continue;
        }
        assert!(contents["gate"].as_object().is_some_and(|gate| !gate.is_empty()), "{} has no gate", file.display());
        let output = sim(&format!("validate {}", file.display()));
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stdout));
        validated += 1;
    }
    assert!(validated >= 3);
}

/// A recorded run, changed, as the only one of a file that is validated: the exit code and what is printed.
fn validated(test: &str, change: impl Fn(&mut serde_json::Value)) -> (Option<i32>, String) {
    let recorded = format!("{}/validation", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(format!("{recorded}/ours-h100-g.json")).unwrap();
    let mut file: serde_json::Value = serde_json::from_str(&text).unwrap();
    let name = "7b-8-layers auto:25GB 4x4096 32k auto defer fires";
    let mut run = file["runs"].as_array().unwrap().iter().find(|run| run["name"] == name).unwrap().clone();
    change(&mut run);
    let folder = std::env::temp_dir().join(format!("tierwise-sim-{test}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let hardware = run["hardware"].as_str().unwrap();
    std::fs::copy(format!("{recorded}/{hardware}"), folder.join(hardware)).unwrap();
    file.as_object_mut().unwrap().remove("gate");
    file["runs"] = serde_json::Value::Array(vec![run]);
    let path = folder.join("runs.json");
    std::fs::write(&path, file.to_string()).unwrap();
    let output = sim(&format!("validate {} --format json", path.display()));
    std::fs::remove_dir_all(&folder).unwrap();
    (output.status.code(), String::from_utf8(output.stdout).unwrap())
}

#[test]
fn a_forward_waits_for_gradients_that_are_in_the_way_of_its_kernels() {
    // Four gradients on their way while the host is half as fast as it was: the second forward meets those of the first micro-batch.
    for reserve in [0_u64, 1_499_888_500] {
        let (code, printed) = validated("waits", |run| {
            run["executed"]["grad_in_flight_bytes"] = 1_619_066_880_u64.into();
            run["executed"]["device"]["reserve"] = reserve.into();
            for rate in run["host_adam_params_per_s"].as_array_mut().unwrap() {
                *rate = (rate.as_f64().unwrap() / 2.0).into();
            }
        });
        assert_eq!(code, Some(0), "{printed}");
        let found: serde_json::Value = serde_json::from_str(&printed).unwrap();
        // The runtime waited until its reserve was free, which is more than these kernels need.
        let error = found["runs"][0]["metrics"]["device_peak_bytes"]["error_percent"].as_f64().unwrap();
        assert_eq!(error.abs() < 0.1, reserve > 0, "{error} %");
    }
}

#[test]
fn what_is_predicted_not_to_fit_is_named() {
    let (code, printed) = validated("short", |run| run["device_budget"] = 20_000_000_000_u64.into());
    assert_eq!(code, Some(4), "{printed}");
    let found: serde_json::Value = serde_json::from_str(&printed).unwrap();
    let failure = found["failures"][0].as_str().unwrap();
    assert!(failure.contains("is predicted not to fit and did: ") && failure.contains("GB are needed of the device at `"), "{failure}");
    assert_eq!(found["runs"][0]["shortfall"]["tier"], "device");
}

#[test]
fn validation_has_a_gate() {
    let file = |name: &str| format!("{}/validation/{name}", env!("CARGO_MANIFEST_DIR"));
    let passed = json(&sim(&format!("validate {} --format json", file("peers-h100.json"))));
    assert_eq!((passed["passed"].as_bool(), passed["schema_version"].as_u64()), (Some(true), Some(1)));
    assert!(passed["summary"]["step_s"]["runs"].as_u64().unwrap() >= 7);
    // The same records with a gate that nothing passes.
    let text = std::fs::read_to_string(file("peers-h100.json")).unwrap();
    let mut strict: serde_json::Value = serde_json::from_str(&text).unwrap();
    strict["gate"] = serde_json::json!({"step_s": {"max": 0.001}});
    let path = std::env::temp_dir().join(format!("tierwise-sim-gate-{}.json", std::process::id()));
    std::fs::write(&path, strict.to_string()).unwrap();
    let failed = sim(&format!("validate {}", path.display()));
    std::fs::remove_file(&path).unwrap();
    assert_eq!(failed.status.code(), Some(4), "{failed:?}");
    assert!(String::from_utf8(failed.stdout).unwrap().contains("failed: max error of step_s"));
    let missing = sim("validate no-such-file.json");
    assert_eq!(missing.status.code(), Some(2));
}

/// Below `ZeRO` 3 parameters stay whole: a faster plan that streams them does not keep one that fits from being found.
#[test]
fn what_has_to_stay_whole_fits_if_any_of_the_compared_plans_keeps_it() {
    for (micro_batch, zero, budget) in [(1, 1, "66GB"), (2, 2, "52GB"), (4, 2, "70GB")] {
        let report = json(&sim(&format!(
            "run --model llama2-7b --hardware dgx-a100-80 --gpus 8 --tokens-per-step 131072 --micro-batch {micro_batch} --zero {zero} \
             --device-budget {budget} --format json"
        )));
        assert_eq!((report["fits"].as_bool(), report["plan"]["streamed_numel"].as_u64()), (Some(true), Some(0)), "{report}");
    }
}

/// A folder of a test's own.
fn scratch(test: &str) -> std::path::PathBuf {
    let folder = std::env::temp_dir().join(format!("tierwise-sim-{test}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// A file of `validation`.
fn recorded(name: &str) -> serde_json::Value {
    let path = format!("{}/validation/{name}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn run_of(file: &serde_json::Value, name: &str) -> serde_json::Value {
    file["runs"].as_array().unwrap().iter().find(|run| run["name"] == name).unwrap().clone()
}

#[test]
fn validation_writes_the_timelines_of_what_fits() {
    let scratch = scratch("traces");
    let mut file = recorded("ours-h100-c.json");
    file["gate"] = serde_json::json!({});
    let names = ["1b host 4x4096 16k full defer fires", "1b device 16x4096 64k none defer fires"];
    file["runs"] = names.map(|name| run_of(&file, name)).into_iter().collect();
    std::fs::write(scratch.join("runs.json"), file.to_string()).unwrap();
    std::fs::write(scratch.join("h100-2026-11-27-c.json"), recorded("h100-2026-11-27-c.json").to_string()).unwrap();
    let output = sim(&format!("validate {} --traces {}", scratch.join("runs.json").display(), scratch.join("traces/new").display()));
    assert!(output.status.success(), "{output:?}");
    let written: Vec<_> = std::fs::read_dir(scratch.join("traces/new")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(written, [scratch.join("traces/new/1b_host_4x4096_16k_full_defer_fires.json")], "the other does not fit");
    let trace: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&written[0]).unwrap()).unwrap();
    let is_step = |event: &serde_json::Value| event["name"] == "step model.layers.3";
    assert!(trace["traceEvents"].as_array().unwrap().iter().any(is_step));
    // A file is no folder.
    let refused = sim(&format!("validate {0} --traces {0}", scratch.join("runs.json").display()));
    assert_eq!(refused.status.code(), Some(1));
    std::fs::remove_dir_all(&scratch).unwrap();
}

fn predicted_steps(path: &std::path::Path) -> Vec<f64> {
    let report = json(&sim(&format!("validate {} --format json", path.display())));
    report["runs"].as_array().unwrap().iter().map(|run| run["metrics"]["step_s"]["predicted"].as_f64().unwrap()).collect()
}

fn refuses(path: &std::path::Path, problem: &str) {
    let refused = sim(&format!("validate {}", path.display()));
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    assert!(String::from_utf8(refused.stderr).unwrap().contains(problem));
}

#[test]
fn a_run_is_predicted_with_the_training_thread_that_it_met() {
    let scratch = scratch("launched");
    let mut hardware = recorded("h100-2026-11-27-b.json");
    hardware["measured"]["launch"]["probe_ns"] = 4_000_000.into();
    std::fs::write(scratch.join("probed.json"), hardware.to_string()).unwrap();
    let mut file = recorded("ours-h100-b.json");
    // Python bounds the first, the device the second.
    let runs = [
        "350m device 1x4096 4k none defer fires",
        "7b auto:78GB 4x4096 16k auto defer fires",
        "7b-8-layers device 2x4096 8k none defer fires",
    ]
    .map(|name| run_of(&file, name));
    let probed = |run: &serde_json::Value, hardware: &str, probes: &[f64]| {
        let mut run = run.clone();
        run["hardware"] = hardware.into();
        run["launch_probe_ns"] = probes.into();
        run
    };
    let probes = [vec![], vec![40e6, 4.1e6, 3.9e6, 3.5e6], vec![8e6], vec![3e6], vec![4.1e6], vec![5e6], vec![7e6], vec![12e6]];
    file["runs"] = runs.iter().flat_map(|run| probes.iter().map(|probes| probed(run, "probed.json", probes))).collect();
    file["gate"] = serde_json::json!({});
    let path = scratch.join("runs.json");
    std::fs::write(&path, file.to_string()).unwrap();
    let steps = predicted_steps(&path);
    let steps: Vec<&[f64]> = steps.chunks(probes.len()).collect();
    assert!(steps[0][1].to_bits() == steps[0][0].to_bits() && (steps[0][2] / steps[0][0] - 2.0).abs() < 0.05, "{steps:?}");
    assert!((steps[1][2] / steps[1][0] - 1.0).abs() < 0.02, "{steps:?}");
    // A slower thread never makes a step faster, nor the device's power limit another one.
    for steps in steps {
        let rising = [3, 0, 4, 5, 6, 2, 7].map(|at| steps[at]);
        assert!(rising.windows(2).all(|pair| pair[1] > 0.999 * pair[0]), "{rising:?}");
    }
    for (hardware, probe, problem) in
        [("h100", 4e6, "has no `measured.launch.probe_ns`"), ("probed.json", 0.0, "is 0; it was calibrated as 4000000")]
    {
        file["runs"] = vec![probed(&runs[0], hardware, &[probe])].into();
        std::fs::write(&path, file.to_string()).unwrap();
        refuses(&path, problem);
    }
    std::fs::remove_dir_all(&scratch).unwrap();
}

#[test]
fn passes_of_host_steps_take_what_was_measured_of_them() {
    let scratch = scratch("passes");
    let mut file = recorded("ours-h100-c.json");
    file["gate"] = serde_json::json!({});
    // Steps in two passes, and in one.
    file["runs"] = ["1b host 4x4096 16k full defer fires", "1b host 4x4096 16k none speculate quiet"]
        .map(|name| run_of(&file, name))
        .into_iter()
        .collect();
    std::fs::write(scratch.join("runs.json"), file.to_string()).unwrap();
    // Parameters per second of either pass: alone, and beside the copies that it meets.
    let steps = |params: [f64; 2], moments: [f64; 2]| -> Vec<f64> {
        let mut hardware = recorded("h100-2026-11-27-c.json");
        let measured = &mut hardware["measured"];
        for row in measured["sharing"].as_array_mut().unwrap() {
            let has = |actor: &str| row["actors"].as_array().unwrap().iter().any(|found| found == actor);
            let (adam, h2d, d2h) = (has("adam"), has("h2d"), has("d2h"));
            if adam && !d2h {
                row["params_first_per_s"] = params[usize::from(h2d)].into();
            }
            if adam && !h2d {
                row["moments_per_s"] = moments[usize::from(d2h)].into();
            }
        }
        measured["host"].as_array_mut().unwrap().last_mut().unwrap()["moments_per_s"] = moments[0].into();
        std::fs::write(scratch.join("h100-2026-11-27-c.json"), hardware.to_string()).unwrap();
        predicted_steps(&scratch.join("runs.json"))
    };
    let even = steps([8e9, 8e9], [9e9, 9e9]);
    let bound_by_moments = steps([8e9, 8e9], [2e9, 2e9]);
    // While gradients are copied, backward leaves moments time enough, unless they bound it: then what copies take from them shows.
    for (even, params, moments, times) in
        [(&even, [8e9, 2e9], [9e9, 9e9], 1.1), (&bound_by_moments, [8e9, 8e9], [2e9, 1e8], 1.02), (&even, [8e9, 8e9], [2e9, 2e9], 1.1)]
    {
        let slower = steps(params, moments);
        assert!(slower[0] > times * even[0], "{params:?} {moments:?}: {slower:?} after {even:?}");
        assert!(slower[1].to_bits() == even[1].to_bits(), "{params:?} {moments:?}: {slower:?} after {even:?}");
    }
    std::fs::remove_dir_all(&scratch).unwrap();
}

#[test]
fn a_run_is_predicted_with_the_host_that_it_met() {
    let folder = format!("{}/validation", env!("CARGO_MANIFEST_DIR"));
    let (mut file, calibrated) = (recorded("ours-h100-b.json"), recorded("h100-2026-11-27-b.json"));
    let rate = calibrated["measured"]["host"].as_array().unwrap().last().unwrap()["adam_params_per_s"].as_f64().unwrap();
    let [on_host, on_device] =
        ["1b host 4x4096 16k none defer fires", "1b device 4x4096 16k none defer fires"].map(|name| run_of(&file, name));
    let probed = |run: &serde_json::Value, probes: &[f64]| {
        let mut run = run.clone();
        run["hardware"] = format!("{folder}/h100-2026-11-27-b.json").into();
        run["host_adam_params_per_s"] = probes.into();
        run
    };
    // Half as fast, as calibrated, twice as fast; the mean of the probes counts.
    let probes = [vec![], vec![0.5 * rate], vec![0.9 * rate, 1.1 * rate], vec![2.0 * rate]];
    file["runs"] = [&on_host, &on_device].iter().flat_map(|run| probes.iter().map(|probes| probed(run, probes))).collect();
    file["gate"] = serde_json::json!({});
    let path = std::env::temp_dir().join(format!("tierwise-sim-probed-{}.json", std::process::id()));
    std::fs::write(&path, file.to_string()).unwrap();
    let steps = predicted_steps(&path);
    assert!(steps[1] > 1.4 * steps[0] && (steps[2] / steps[0] - 1.0).abs() < 1e-6 && steps[3] < 0.9 * steps[0], "{steps:?}");
    assert!(steps[4..].iter().all(|step| step.to_bits() == steps[4].to_bits()), "{steps:?}");
    // Nothing is made of a rate that no calibration can be compared with.
    for (hardware, probe, problem) in
        [("h100", rate, "has no `measured.host`"), ("h100-2026-11-27-b.json", 0.0, "is 0; it was calibrated as")]
    {
        let mut run = probed(&on_host, &[probe]);
        run["hardware"] = if hardware == "h100" { hardware.into() } else { format!("{folder}/{hardware}").into() };
        file["runs"] = vec![run].into();
        std::fs::write(&path, file.to_string()).unwrap();
        refuses(&path, problem);
    }
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn the_html_report_needs_nothing_else() {
    let path = std::env::temp_dir().join(format!("tierwise-sim-{}.html", std::process::id()));
    let output = sim(&format!("{RUN} --device-budget 40GB --html {}", path.display()));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let page = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    for part in ["<title>llama2-7b on 1 x h100", "id=\"device-bytes\" d=\"M0 ", "stall: optimizer step", "saved activations"] {
        assert!(page.contains(part), "{part}");
    }
    for outside in ["http", "<script", "@import", "url("] {
        assert!(!page.contains(outside), "{outside}");
    }
}

#[test]
fn completions_and_the_manual_name_every_command() {
    let bash = String::from_utf8(sim("completions bash").stdout).unwrap();
    let man = String::from_utf8(sim("man").stdout).unwrap();
    for command in ["run", "search", "compare", "validate", "models", "hardware"] {
        assert!(bash.contains(command) && man.contains(command), "{command}");
    }
    assert!(man.starts_with(".ie") && man.contains("tierwise"), "{man}");
}

#[test]
fn lists_and_version() {
    let version = sim("--version");
    assert_eq!(version.status.code(), Some(0));
    assert_eq!(version.stdout, format!("tierwise-sim {}\n", env!("CARGO_PKG_VERSION")).into_bytes());
    assert!(String::from_utf8(sim("models").stdout).unwrap().contains("68976648192"));
    assert_eq!(json(&sim("models --format json"))["schema_version"], 1);
    assert_eq!(json(&sim("hardware --format json"))["hardware"][0]["name"], "h100");
}
