//! The live part: a line each second, kills and restarts in between, and how long each agent was away.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bson::Document;
use farshore_testkit::pair::{Pair, Side};
use mongodb::Client;
use tokio::time::MissedTickBehavior;

use crate::control::{self, Operator};
use crate::plan::{Event, Plan};
use crate::screen::{Line, Screen, Tone, grouped, seconds};
use crate::{DATABASE, RATE};

/// Time between two looks at the collections.
const LOOK: Duration = Duration::from_millis(100);
/// Fewer ratings behind than are written in half a second is caught up.
const CAUGHT_UP: u64 = RATE as u64 / 2;
/// After the last restart the stream must have caught up within this.
const PATIENCE: Duration = Duration::from_secs(90);

/// The time one agent was away.
pub(crate) struct Absence {
    pub(crate) side: Side,
    killed: Instant,
    away: Option<Duration>,
    /// From the restart until south was close behind again.
    caught_up: Option<Duration>,
    /// Most ratings that south lacked.
    worst: u64,
}

impl fmt::Display for Absence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let span = |span: Option<Duration>| span.map_or_else(|| "?".to_owned(), seconds);
        let (away, caught_up) = (span(self.away), span(self.caught_up));
        write!(f, "away {away}; {} behind at worst; caught up {caught_up} after it was back", grouped(self.worst))
    }
}

/// Ratings at a site.
pub(crate) async fn count(client: &Client) -> Result<u64> {
    let ratings = client.database(DATABASE).collection::<Document>("ratings");
    ratings.estimated_document_count().await.context("count the ratings")
}

struct Live<'a> {
    screen: Screen,
    pair: &'a mut Pair,
    operator: &'a Operator,
    absences: Vec<Absence>,
}

/// Shows the stream for `length` (longer when it has not caught up by then) and does what the plan says.
pub(crate) async fn watch(
    screen: Screen,
    pair: &mut Pair,
    operator: &Operator,
    length: Duration,
) -> Result<Vec<Absence>> {
    // Nothing sees more than the application: counts are read as its user.
    let clients =
        [Side::North, Side::South].map(|side| pair.site(side).mongo.client(farshore_testkit::mongo::User::App));
    let [north, south] = clients;
    let (north, south) = (north?, south?);
    let mut live = Live { screen, pair, operator, absences: Vec::new() };
    let (mut plan, start, mut printed) = (Plan::new(length), Instant::now(), None);
    let mut ticks = tokio::time::interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    screen.table_head();
    loop {
        ticks.tick().await;
        let elapsed = start.elapsed();
        while let Some(event) = plan.due(elapsed) {
            live.happen(event)?;
        }
        // South first: what is counted at north in between makes the distance larger, never smaller.
        let at_south = count(&south).await?;
        let at_north = count(&north).await?;
        live.observe(at_north.saturating_sub(at_south));
        if printed != Some(elapsed.as_secs()) {
            printed = Some(elapsed.as_secs());
            let (agents, lag) = (live.agents(), live.lag().await);
            screen.line(&Line { elapsed, north: at_north, south: at_south, lag, agents });
        }
        ensure!(elapsed < length + PATIENCE, "the stream has not caught up {PATIENCE:?} after the last restart");
        if plan.is_over(elapsed) && live.absences.iter().all(|absence| absence.caught_up.is_some()) {
            return Ok(live.absences);
        }
    }
}

impl Live<'_> {
    fn happen(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Kill(side) => {
                let agent = &mut self.pair.site(side).agents[0];
                let pid = agent.pid();
                agent.kill9()?;
                let what = match side {
                    Side::North => "Nobody reads north's changes now; MongoDB's oplog keeps them",
                    Side::South => "North's agent keeps every change in its outbox on disk",
                };
                self.screen.happens(Tone::Bad, format!("kill -9 {pid}: the agent of {}. {what}.", side.name()));
                let absence = Absence { side, killed: Instant::now(), away: None, caught_up: None, worst: 0 };
                self.absences.push(absence);
            }
            Event::Restart(side) => {
                let agent = &mut self.pair.site(side).agents[0];
                agent.restart()?;
                let pid = agent.pid();
                if let Some(absence) = self.absences.last_mut() {
                    absence.away = Some(absence.killed.elapsed());
                }
                self.screen
                    .happens(Tone::Doubt, format!("The agent of {} is started again: process {pid}.", side.name()));
            }
        }
        Ok(())
    }

    /// Notes how far south is behind.
    fn observe(&mut self, behind: u64) {
        let Some(absence) = self.absences.last_mut().filter(|absence| absence.caught_up.is_none()) else { return };
        absence.worst = absence.worst.max(behind);
        let Some(away) = absence.away else { return };
        if behind < CAUGHT_UP {
            let caught_up = absence.killed.elapsed().saturating_sub(away);
            absence.caught_up = Some(caught_up);
            let text = format!("Caught up {} after the restart.", seconds(caught_up));
            self.screen.happens(Tone::Good, text);
        }
    }

    fn agents(&mut self) -> [bool; 2] {
        [Side::North, Side::South].map(|side| self.pair.site(side).agents[0].is_running())
    }

    /// The target's word; the source's while the target's agent is down.
    async fn lag(&self) -> Option<Duration> {
        for agent in [&self.pair.south.agents[0], &self.pair.north.agents[0]] {
            if let Ok(stream) = self.operator.stream(agent).await
                && let Some(lag) = control::lag(&stream)
            {
                return Some(lag);
            }
        }
        None
    }
}
