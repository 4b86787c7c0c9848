//! Owns every long task of the agent: names them, ends the process when one ends by itself, and shuts them down in stages.
//!
//! No task is restarted in the process: retry lives inside a task, and what a task cannot retry is a reason to start
//! afresh from what is stored.

use std::future::Future;
use std::time::Duration;

use tokio::task::{Id, JoinSet};
use tokio_util::sync::CancellationToken;

/// Why the agent stops.
#[derive(Debug)]
pub enum Stop {
    /// It was told to.
    Requested,
    /// It is to start again with a changed login to MongoDB.
    Renewed,
    /// A long task ended by itself.
    Ended { task: &'static str, reason: String },
}

/// A stage of shutting down: its tasks are told to stop together and given so long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// What brings work in: change stream, sessions, lease.
    Intake,
    /// What finishes work in hand: apply.
    Work,
    /// What the others stand on.
    Base,
}

const STAGES: [(Stage, Duration); 3] = [
    (Stage::Intake, Duration::from_secs(10)),
    (Stage::Work, Duration::from_secs(10)),
    (Stage::Base, Duration::from_secs(5)),
];

/// See the module text.
pub struct Supervisor {
    tasks: JoinSet<(Stage, &'static str, Result<(), String>)>,
    names: Vec<(Id, Stage, &'static str)>,
    tokens: [CancellationToken; 3],
}

impl Supervisor {
    /// Owns nothing yet.
    pub fn new() -> Self {
        Self { tasks: JoinSet::new(), names: Vec::new(), tokens: Default::default() }
    }

    /// The token that tells the tasks of a stage to stop.
    pub fn token(&self, stage: Stage) -> CancellationToken {
        self.tokens[stage as usize].clone()
    }

    /// Starts a long task; its end before it was told to stop ends the agent.
    pub fn spawn<F>(&mut self, stage: Stage, name: &'static str, task: F)
    where
        F: Future<Output = Result<(), String>> + Send + 'static,
    {
        let handle = self.tasks.spawn(async move { (stage, name, task.await) });
        self.names.push((handle.id(), stage, name));
    }

    /// Waits until a task ends by itself.
    pub async fn failed(&mut self) -> Stop {
        match self.tasks.join_next_with_id().await {
            Some(Ok((id, (_, task, result)))) => {
                self.forget(id);
                let reason = result.err().unwrap_or_else(|| "it ended without being told to".into());
                Stop::Ended { task, reason }
            }
            Some(Err(error)) => {
                let task = self.forget(error.id()).unwrap_or("unknown");
                Stop::Ended { task, reason: error.to_string() }
            }
            None => std::future::pending().await,
        }
    }

    fn forget(&mut self, id: Id) -> Option<&'static str> {
        let at = self.names.iter().position(|(known, ..)| *known == id)?;
        Some(self.names.swap_remove(at).2)
    }

    /// Stops all tasks stage by stage; names those that did not stop in time.
    pub async fn shut_down(mut self) {
        for (stage, deadline) in STAGES {
            self.tokens[stage as usize].cancel();
            if tokio::time::timeout(deadline, self.drain(stage)).await.is_err() {
                let late: Vec<_> = self.names.iter().filter(|(_, s, _)| *s == stage).map(|(.., name)| *name).collect();
                tracing::warn!(?stage, ?late, "tasks did not stop in time and are dropped");
            }
        }
        self.tasks.shutdown().await;
    }

    async fn drain(&mut self, stage: Stage) {
        while self.names.iter().any(|(_, s, _)| *s == stage) {
            match self.tasks.join_next_with_id().await {
                Some(Ok((id, _))) => drop(self.forget(id)),
                Some(Err(error)) => drop(self.forget(error.id())),
                None => return,
            }
        }
    }
}

impl Default for Supervisor {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[tokio::test]
    async fn a_task_that_ends_by_itself_is_named() {
        let mut supervisor = Supervisor::new();
        supervisor.spawn(Stage::Work, "steady", std::future::pending());
        supervisor.spawn(Stage::Work, "short", async { Err("out of luck".into()) });
        let Stop::Ended { task, reason } = supervisor.failed().await else { panic!("ended") };
        assert_eq!((task, reason.as_str()), ("short", "out of luck"));
    }

    #[tokio::test]
    async fn stages_stop_in_order() {
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut supervisor = Supervisor::new();
        for (stage, name) in [(Stage::Base, "base"), (Stage::Intake, "intake"), (Stage::Work, "work")] {
            let (order, token) = (order.clone(), supervisor.token(stage));
            supervisor.spawn(stage, name, async move {
                token.cancelled().await;
                order.lock().expect("no panic").push(name);
                Ok(())
            });
        }
        supervisor.shut_down().await;
        assert_eq!(*order.lock().expect("no panic"), ["intake", "work", "base"]);
    }
}
