//! Pipeline schedules: when each stage works on which micro-batch, and how long a step of all of them takes.

use serde::Serialize;

/// Order of the micro-batches on every stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// All forwards, then all backwards (Huang et al. 2018, arXiv 1811.06965).
    Gpipe,
    /// One forward, one backward after a warm-up (Narayanan et al. 2019, PipeDream; arXiv 2104.04473, section 2.2.1).
    #[serde(rename = "1f1b")]
    OneFOneB,
    /// The same with several parts of the model per stage (Narayanan et al. 2021, arXiv 2104.04473, section 2.2.2).
    Interleaved(u64),
    /// The backward of weights fills the bubble, in the memory of 1F1B (ZB-H1; Qi et al. 2023, arXiv 2401.10241).
    ZeroBubble,
}

/// What a stage does to one micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    Forward { micro_batch: u64, chunk: u64 },
    Backward { micro_batch: u64, chunk: u64 },
}

/// Nanoseconds of one stage's work on one micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StageCost {
    /// Forward.
    pub forward_ns: u64,
    /// Backward, recomputation included.
    pub backward_ns: u64,
    /// Of the backward, gradients of weights, which nobody waits for.
    pub weights_ns: u64,
}

impl Schedule {
    /// Parts of the model per stage.
    pub fn chunks(self) -> u64 {
        match self {
            Schedule::Interleaved(chunks) => chunks,
            _ => 1,
        }
    }

    /// Micro-batches whose activations a stage holds at most, in whole stages' worth, rounded up.
    pub fn in_flight(self, stage: u64, stages: u64, micro_batches: u64) -> u64 {
        match self {
            Schedule::Gpipe => micro_batches,
            _ if stages == 1 => 1,
            Schedule::OneFOneB => (stages - stage).min(micro_batches),
            Schedule::Interleaved(chunks) => {
                (warm_up(stage, stages, micro_batches, chunks) + 1).min(chunks * micro_batches).div_ceil(chunks)
            }
            Schedule::ZeroBubble => stages.min(micro_batches),
        }
    }

    fn order(self, stage: u64, stages: u64, micro_batches: u64) -> Vec<Work> {
        let chunks = self.chunks();
        let total = chunks * micro_batches;
        let warm_up = match self {
            Schedule::Gpipe => total,
            Schedule::OneFOneB | Schedule::ZeroBubble => (stages - stage - 1).min(total),
            Schedule::Interleaved(_) => warm_up(stage, stages, micro_batches, chunks),
        };
        // Groups of as many micro-batches as stages go through the chunks in turn; backwards through them in reverse.
        let place = |at: u64, backward: bool| {
            let within = at % (stages * chunks);
            let chunk = within / stages;
            let micro_batch = at / (stages * chunks) * stages + within % stages;
            (if chunks == 1 { at } else { micro_batch }, if backward { chunks - 1 - chunk } else { chunk })
        };
        let forward = |at| {
            let (micro_batch, chunk) = place(at, false);
            Work::Forward { micro_batch, chunk: if chunks == 1 { 0 } else { chunk } }
        };
        let backward = |at| {
            let (micro_batch, chunk) = place(at, true);
            Work::Backward { micro_batch, chunk: if chunks == 1 { 0 } else { chunk } }
        };
        let mut order: Vec<Work> = (0..warm_up).map(forward).collect();
        for at in warm_up..total {
            order.push(forward(at));
            order.push(backward(at - warm_up));
        }
        order.extend((total - warm_up..total).map(backward));
        order
    }

    /// Nanoseconds from the first forward to the end of the last backward.
    ///
    /// # Errors
    /// If an interleaved schedule's micro-batches are no multiple of the stages.
    pub fn makespan_ns(self, costs: &[StageCost], micro_batches: u64, send_ns: u64) -> Result<u64, String> {
        let stages = costs.len() as u64;
        let chunks = self.chunks();
        if chunks > 1 && !micro_batches.is_multiple_of(stages) {
            return Err(format!(
                "{micro_batches} micro-batches per step; an interleaved pipeline of {stages} stages needs a multiple of {stages}"
            ));
        }
        let orders: Vec<Vec<Work>> = (0..stages).map(|stage| self.order(stage, stages, micro_batches)).collect();
        let mut run = Run::new(self, costs, micro_batches, send_ns);
        let mut next = vec![0; stages as usize];
        loop {
            // The earliest start first, so that weights fill only what is idle.
            let candidate = (0..stages as usize).filter_map(|s| run.candidate(s, orders[s].get(next[s])).map(|c| (c, s))).min();
            let Some(((start, is_weights), stage)) = candidate else { break };
            if is_weights {
                run.weights(stage, start);
            } else {
                run.work(stage, start, orders[stage][next[stage]]);
                next[stage] += 1;
            }
        }
        debug_assert!(next.iter().zip(&orders).all(|(n, o)| *n == o.len()), "every order can be carried out");
        Ok(run.free_ns.into_iter().max().unwrap_or(0))
    }
}

fn warm_up(stage: u64, stages: u64, micro_batches: u64, chunks: u64) -> u64 {
    ((stages - stage - 1) * 2 + (chunks - 1) * stages).min(chunks * micro_batches)
}

struct Run<'a> {
    costs: &'a [StageCost],
    splits: bool,
    chunks: u64,
    micro_batches: u64,
    send_ns: u64,
    free_ns: Vec<u64>,
    /// Weights whose gradients are still to be computed, per stage.
    pending: Vec<u64>,
    /// Micro-batches whose activations are alive, per stage.
    alive: Vec<u64>,
    /// Ends by virtual stage and micro-batch.
    forward: Vec<Option<u64>>,
    backward: Vec<Option<u64>>,
}

impl<'a> Run<'a> {
    fn new(schedule: Schedule, costs: &'a [StageCost], micro_batches: u64, send_ns: u64) -> Self {
        let stages = costs.len();
        let cells = stages * (schedule.chunks() * micro_batches) as usize;
        Run {
            costs,
            splits: schedule == Schedule::ZeroBubble,
            chunks: schedule.chunks(),
            micro_batches,
            send_ns,
            free_ns: vec![0; stages],
            pending: vec![0; stages],
            alive: vec![0; stages],
            forward: vec![None; cells],
            backward: vec![None; cells],
        }
    }

    fn cell(&self, virtual_stage: u64, micro_batch: u64) -> usize {
        (virtual_stage * self.micro_batches + micro_batch) as usize
    }

    /// When the inputs of a piece of work have arrived.
    fn ready(&self, stage: usize, work: Work) -> Option<u64> {
        let stages = self.costs.len() as u64;
        match work {
            Work::Forward { micro_batch, chunk } => {
                let at = chunk * stages + stage as u64;
                if at == 0 { Some(0) } else { self.forward[self.cell(at - 1, micro_batch)].map(|end| end + self.send_ns) }
            }
            Work::Backward { micro_batch, chunk } => {
                let at = chunk * stages + stage as u64;
                let last = stages * self.chunks - 1;
                let own = self.forward[self.cell(at, micro_batch)]?;
                if at == last { Some(own) } else { self.backward[self.cell(at + 1, micro_batch)].map(|end| (end + self.send_ns).max(own)) }
            }
        }
    }

    /// When a stage could go on, and whether with weights.
    fn candidate(&self, stage: usize, next: Option<&Work>) -> Option<(u64, bool)> {
        let free = self.free_ns[stage];
        let weights = (self.pending[stage] > 0).then_some((free, true));
        let Some(&work) = next else { return weights };
        let full = self.splits && matches!(work, Work::Forward { .. }) && self.alive[stage] >= self.costs.len() as u64;
        match self.ready(stage, work) {
            Some(ready) if !full && (ready <= free || weights.is_none()) => Some((ready.max(free), false)),
            _ => weights,
        }
    }

    fn work(&mut self, stage: usize, start: u64, work: Work) {
        let cost = self.costs[stage];
        let stages = self.costs.len() as u64;
        match work {
            Work::Forward { micro_batch, chunk } => {
                let end = start + cost.forward_ns / self.chunks;
                let cell = self.cell(chunk * stages + stage as u64, micro_batch);
                self.forward[cell] = Some(end);
                self.free_ns[stage] = end;
                self.alive[stage] += 1;
            }
            Work::Backward { micro_batch, chunk } => {
                let weights = if self.splits { cost.weights_ns } else { 0 };
                let end = start + (cost.backward_ns - weights) / self.chunks;
                let cell = self.cell(chunk * stages + stage as u64, micro_batch);
                self.backward[cell] = Some(end);
                self.free_ns[stage] = end;
                if self.splits {
                    self.pending[stage] += 1;
                } else {
                    self.alive[stage] -= 1;
                }
            }
        }
    }

    fn weights(&mut self, stage: usize, start: u64) {
        self.free_ns[stage] = start + self.costs[stage].weights_ns;
        self.pending[stage] -= 1;
        self.alive[stage] -= 1;
    }
}
