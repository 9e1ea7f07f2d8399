//! The built command: exit codes, streams, equal bytes.

use std::process::{Command, Output};

fn sim(args: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tierwise-sim")).args(args.split_whitespace()).output().unwrap()
}

fn json(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

const RUN: &str = "run --model llama2-7b --hardware h100 --seq 4096 --micro-batch 4 --tokens-per-step 16384";

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

#[test]
fn lists_and_version() {
    let version = sim("--version");
    assert_eq!(version.status.code(), Some(0));
    assert_eq!(version.stdout, format!("tierwise-sim {}\n", env!("CARGO_PKG_VERSION")).into_bytes());
    assert!(String::from_utf8(sim("models").stdout).unwrap().contains("68976648192"));
    assert_eq!(json(&sim("models --format json"))["schema_version"], 1);
    assert_eq!(json(&sim("hardware --format json"))["hardware"][0]["name"], "h100");
}
