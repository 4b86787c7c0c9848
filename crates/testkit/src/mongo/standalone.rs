//! A `mongod` that is no member of a replica set: what an agent must refuse.

use anyhow::Result;

use super::member::Member;
use super::options::Options;
use super::setup;
use crate::scratch::Scratch;

/// One server on its own, without users; killed when dropped.
pub struct Standalone {
    member: Member,
    // Last: the folder goes after the process in it.
    _folder: Scratch,
}

impl Standalone {
    /// Starts it and waits until it listens.
    pub async fn start() -> Result<Self> {
        let folder = Scratch::new("standalone")?;
        let options = Options { name: String::new(), auth: false, ..Options::default() };
        let member = Member::start(folder.path(), &options, None, None)?;
        setup::listening(&member.port.address().to_string()).await?;
        Ok(Self { member, _folder: folder })
    }

    /// Its URI.
    pub fn uri(&self) -> String {
        format!("mongodb://{}/", self.member.port)
    }
}
