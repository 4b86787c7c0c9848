//! What the frames of a session mean: Hello, rejections, and who may say what.
//!
//! Frames come from another process, perhaps of another version, perhaps damaged: everything is checked here, and what
//! Hello says must agree with the certificate. Pure; may be used by every part of the link.

use farshore_api::replication::v1 as pb;
pub use farshore_api::replication::v1::reject::Reason;

use crate::model::{AgentId, ClusterTime, Epoch, Incarnation, Position, SiteName, StreamHash, Term};

/// The protocol version this release speaks.
pub const VERSION: u32 = 1;

/// Every reason there is, with its name for metrics.
pub const REASONS: [(Reason, &str); 11] = [
    (Reason::Version, "version"),
    (Reason::Identity, "identity"),
    (Reason::Group, "group"),
    (Reason::Epoch, "epoch"),
    (Reason::Term, "term"),
    (Reason::Incarnation, "incarnation"),
    (Reason::NotLeader, "not_leader"),
    (Reason::Gap, "gap"),
    (Reason::Corrupt, "corrupt"),
    (Reason::Start, "start"),
    (Reason::Protocol, "protocol"),
];

/// A refusal, told or to be told to the peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// The kind, on which the peer acts.
    pub reason: Reason,
    /// What happened, for people.
    pub message: String,
    /// What to do about it; may be empty.
    pub hint: String,
    /// Epoch of the rejecting side.
    pub epoch: Epoch,
    /// Highest term of the rejected agent's site that the rejecting side has seen.
    pub term: Term,
}

impl Rejection {
    /// A rejection without epoch and term.
    pub fn new(reason: Reason, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { reason, message: message.into(), hint: hint.into(), epoch: Epoch(0), term: Term(0) }
    }

    /// Whether the same session can be tried again at once: nothing a person must change.
    pub fn is_transient(&self) -> bool {
        matches!(self.reason, Reason::Gap | Reason::Corrupt | Reason::Protocol | Reason::NotLeader)
    }
}

/// The refusal of a frame that is not as it was sent.
pub(super) fn corrupt() -> Rejection {
    Rejection::new(Reason::Corrupt, "a frame was damaged on its way", "")
}

impl From<pb::Reject> for Rejection {
    fn from(reject: pb::Reject) -> Self {
        let (reason, epoch, term) = (reject.reason(), Epoch(reject.epoch), Term(reject.term));
        Self { reason, message: reject.message, hint: reject.hint, epoch, term }
    }
}

impl From<&Rejection> for pb::Reject {
    fn from(rejection: &Rejection) -> Self {
        Self {
            reason: rejection.reason.into(),
            message: rejection.message.clone(),
            hint: rejection.hint.clone(),
            epoch: rejection.epoch.0,
            term: rejection.term.0,
        }
    }
}

/// Where a target stands in a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Everything up to here is durable at the target.
    pub position: Position,
    /// The history `position` belongs to.
    pub incarnation: Incarnation,
    /// Stream hash at `position`.
    pub hash: StreamHash,
}

/// What a target says of a stream it receives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receiving {
    /// Site whose changes are received.
    pub source: SiteName,
    /// `None`: nothing of the stream was ever received.
    pub received: Option<Standing>,
    /// The operator declares that the target equals the source at this cluster time.
    pub start_at: Option<ClusterTime>,
    /// The target holds no user collection.
    pub empty: bool,
}

impl Receiving {
    /// Nothing at or below is wanted: where a fresh stream starts at the earliest.
    pub fn floor(&self) -> Option<Position> {
        self.received.map(|standing| standing.position).or(self.start_at.map(Position::through))
    }
}

impl From<&Receiving> for pb::Receiving {
    fn from(receiving: &Receiving) -> Self {
        let standing = receiving.received;
        let incarnation = standing.map(|s| s.incarnation.0.to_vec()).unwrap_or_default();
        Self {
            source: receiving.source.to_string(),
            received: standing.map(|s| s.position.into()),
            incarnation: incarnation.into(),
            hash: standing.map_or(0, |s| s.hash.0),
            start_at: receiving.start_at.map(|time| time.0),
            empty: receiving.empty,
        }
    }
}

/// What a source says of the stream it originates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Originating {
    /// The site itself.
    pub source: SiteName,
    /// History and end of its outbox; `None` while nothing was captured.
    pub captured: Option<(Incarnation, Position)>,
}

/// The facts of one side's Hello.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// The site that speaks.
    pub site: SiteName,
    /// Its group.
    pub group: String,
    /// Its agent installation.
    pub agent: AgentId,
    /// Its epoch.
    pub epoch: Epoch,
    /// Term of its lease, 0 without one.
    pub term: Term,
    /// Whether it holds the lease.
    pub leader: bool,
    /// Streams it receives.
    pub receiving: Vec<Receiving>,
    /// The stream it originates.
    pub originating: Option<Originating>,
}

impl Greeting {
    /// As sent.
    pub fn to_hello(&self) -> pb::Hello {
        let originating = self.originating.iter().map(|o| pb::Originating {
            source: o.source.to_string(),
            incarnation: o.captured.map(|(i, _)| i.0.to_vec()).unwrap_or_default().into(),
            captured: o.captured.map(|(_, end)| end.into()),
        });
        pb::Hello {
            version_min: VERSION,
            version_max: VERSION,
            site: self.site.to_string(),
            group: self.group.clone(),
            agent: self.agent.to_string(),
            epoch: self.epoch.0,
            term: self.term.0,
            receiving: self.receiving.iter().map(pb::Receiving::from).collect(),
            originating: originating.collect(),
            leader: self.leader,
        }
    }

    /// Reads the peer's Hello and checks it against `peer`, the site its certificate names.
    ///
    /// # Errors
    /// VERSION, IDENTITY or PROTOCOL.
    pub fn parse(hello: &pb::Hello, peer: &SiteName) -> Result<Self, Rejection> {
        if hello.version_min > VERSION || hello.version_max < VERSION {
            let theirs = format!("{} to {}", hello.version_min, hello.version_max);
            let message = format!("the peer speaks protocol {theirs}, this agent speaks {VERSION}");
            return Err(Rejection::new(Reason::Version, message, "upgrade the older of the two agents"));
        }
        if hello.site != peer.as_str() {
            let message = format!("the certificate names site/{peer}, Hello names '{}'", hello.site.escape_debug());
            return Err(identity(message));
        }
        let receiving: Result<_, _> = hello.receiving.iter().map(parse_receiving).collect();
        let originating = match hello.originating.as_slice() {
            [] => None,
            [one] if one.source == peer.as_str() => Some(parse_originating(one, peer)?),
            _ => return Err(identity(format!("{peer} offers streams of other sites"))),
        };
        let agent = uuid::Uuid::parse_str(&hello.agent).map_err(|_| protocol("agent id is not a UUID"))?;
        Ok(Self {
            site: peer.clone(),
            group: hello.group.clone(),
            agent: AgentId(*agent.as_bytes()),
            epoch: Epoch(hello.epoch),
            term: Term(hello.term),
            leader: hello.leader,
            receiving: receiving?,
            originating,
        })
    }

    /// Whether a session with `theirs` may go on; `seen` is the highest term of the peer's site that this side has stored.
    ///
    /// # Errors
    /// GROUP, EPOCH, TERM or NOT_LEADER.
    pub fn accept(&self, theirs: &Self, seen: Term) -> Result<(), Rejection> {
        if theirs.group != self.group {
            let message = format!("group '{}' here, '{}' at the peer", self.group, theirs.group.escape_debug());
            return Err(Rejection::new(Reason::Group, message, "set the same [group] name at both sites"));
        }
        if theirs.originating.is_some() && theirs.epoch < self.epoch {
            return Err(stale_epoch(theirs.epoch, self.epoch));
        }
        if !theirs.leader {
            let message = format!("{} answered through an agent that does not hold its site's lease", theirs.site);
            return Err(Rejection::new(Reason::NotLeader, message, ""));
        }
        if theirs.originating.is_some() && theirs.term < seen {
            return Err(stale_term(theirs.term, seen));
        }
        Ok(())
    }
}

fn parse_receiving(receiving: &pb::Receiving) -> Result<Receiving, Rejection> {
    let source = SiteName::try_from(receiving.source.as_str()).map_err(|e| protocol(&e.to_string()))?;
    let received = match receiving.received {
        None => None,
        Some(position) => Some(Standing {
            position: position.into(),
            incarnation: Incarnation::from_slice(&receiving.incarnation)
                .ok_or_else(|| protocol("a position without its incarnation"))?,
            hash: StreamHash(receiving.hash),
        }),
    };
    Ok(Receiving { source, received, start_at: receiving.start_at.map(ClusterTime), empty: receiving.empty })
}

fn parse_originating(originating: &pb::Originating, source: &SiteName) -> Result<Originating, Rejection> {
    let incarnation = || {
        Incarnation::from_slice(&originating.incarnation).ok_or_else(|| protocol("a position without its incarnation"))
    };
    let captured = match originating.captured {
        None => None,
        Some(end) => Some((incarnation()?, end.into())),
    };
    Ok(Originating { source: source.clone(), captured })
}

pub(crate) fn protocol(message: &str) -> Rejection {
    Rejection::new(Reason::Protocol, message, "")
}

pub(crate) fn identity(message: String) -> Rejection {
    Rejection::new(Reason::Identity, message, "check which certificate that agent uses and its [site] name")
}

pub(crate) fn stale_epoch(theirs: Epoch, ours: Epoch) -> Rejection {
    let message = format!("epoch {theirs} is over, the group is at epoch {ours}");
    let hint = "another site may originate writes now; the sender's site must be fenced";
    Rejection { epoch: ours, ..Rejection::new(Reason::Epoch, message, hint) }
}

pub(crate) fn stale_term(theirs: Term, seen: Term) -> Rejection {
    let message = format!("term {theirs} is over, an agent of term {seen} has taken over");
    Rejection { term: seen, ..Rejection::new(Reason::Term, message, "this agent process stops") }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    fn site(name: &str) -> SiteName {
        SiteName::try_from(name).expect("valid")
    }

    pub(super) fn greeting() -> Greeting {
        let position = Position::new(ClusterTime::new(7, 2), 3);
        let standing = Standing { position, incarnation: Incarnation([9; 16]), hash: StreamHash(0xabcd) };
        Greeting {
            site: site("north"),
            group: "bank".into(),
            agent: AgentId([1; 16]),
            epoch: Epoch(4),
            term: Term(6),
            leader: true,
            receiving: vec![Receiving {
                source: site("south"),
                received: Some(standing),
                start_at: Some(ClusterTime::new(5, 1)),
                empty: true,
            }],
            originating: Some(Originating {
                source: site("north"),
                captured: Some((Incarnation([8; 16]), Position::before(ClusterTime::new(9, 1)))),
            }),
        }
    }

    #[test]
    fn hello_round_trips() {
        let hello = pb::Hello::decode(greeting().to_hello().encode_to_vec().as_slice()).expect("decodes");
        assert_eq!(Greeting::parse(&hello, &site("north")), Ok(greeting()));
    }

    fn parse_changed(change: impl FnOnce(&mut pb::Hello)) -> Reason {
        let mut hello = greeting().to_hello();
        change(&mut hello);
        Greeting::parse(&hello, &site("north")).expect_err("refused").reason
    }

    #[test]
    fn hello_must_agree_with_the_certificate_and_the_protocol() {
        assert_eq!(parse_changed(|h| h.site = "south".into()), Reason::Identity);
        assert_eq!(parse_changed(|h| h.originating[0].source = "south".into()), Reason::Identity);
        assert_eq!(parse_changed(|h| h.originating.push(h.originating[0].clone())), Reason::Identity);
        assert_eq!(parse_changed(|h| (h.version_min, h.version_max) = (2, 3)), Reason::Version);
        assert_eq!(parse_changed(|h| h.version_max = 0), Reason::Version);
        assert_eq!(parse_changed(|h| h.agent = "x".into()), Reason::Protocol);
        assert_eq!(parse_changed(|h| h.receiving[0].incarnation.truncate(3)), Reason::Protocol);
    }

    #[test]
    fn only_current_leaders_of_the_group_are_accepted() {
        let own = Greeting { site: site("south"), ..greeting() };
        let refused = |change: &dyn Fn(&mut Greeting)| {
            let mut theirs = greeting();
            change(&mut theirs);
            own.accept(&theirs, Term(6)).map_err(|rejection| rejection.reason)
        };
        assert_eq!(refused(&|_| ()), Ok(()));
        assert_eq!(refused(&|g| g.group = "shop".into()), Err(Reason::Group));
        assert_eq!(refused(&|g| g.epoch = Epoch(3)), Err(Reason::Epoch));
        assert_eq!(refused(&|g| g.epoch = Epoch(5)), Ok(()));
        assert_eq!(refused(&|g| g.term = Term(5)), Err(Reason::Term));
        assert_eq!(refused(&|g| g.leader = false), Err(Reason::NotLeader));
        let standby = |g: &mut Greeting| (g.epoch, g.term, g.originating) = (Epoch(1), Term(1), None);
        assert_eq!(refused(&standby), Ok(()), "epoch and term fence sources only");
    }
}
