//! What a member keeps with a flow table that outlives its process, and whether a start may go on with it (design §6, "Identity").

use phalanx_control::{Planner, Snapshot};
use phalanx_flow::{BackendId, MemberId};
use serde::{Deserialize, Serialize};
use siphasher::sip::SipHasher24;
use std::hash::Hasher as _;

use crate::config::Config;

/// Version of [`Note`]: another is not understood, and its tables are not gone on with.
const VERSION: u8 = 1;

/// What a forwarder left that was pinned.
pub(super) struct Adopted {
    /// The note of the process that pinned it.
    pub(super) note: Vec<u8>,
    /// The backends that its flows may name.
    pub(super) backends: Vec<BackendId>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    version: u8,
    local: u32,
    boot: u64,
    /// What would make the rows mean something else.
    meaning: u64,
    snapshot: Snapshot,
}

/// A start that goes on with an earlier one's tables.
#[derive(Clone, Copy, Debug)]
pub(super) struct Resumed {
    /// The boot that the tables belong to.
    pub(super) boot: u64,
    /// Nobody else ranked: there is nobody to wait for.
    pub(super) alone: bool,
}

/// The note to keep; `None` while there is nothing to go on with.
pub(super) fn note(config: &Config, planner: &Planner, boot: u64) -> Option<Vec<u8>> {
    let note = Note {
        version: VERSION,
        local: config.member.id.0,
        boot,
        meaning: meaning(config),
        snapshot: planner.snapshot()?,
    };
    postcard::to_stdvec(&note).ok()
}

/// Restores the planner from what was adopted; a sentence says why that cannot be.
pub(super) fn resume(config: &Config, planner: &mut Planner, adopted: &Adopted) -> Result<Resumed, String> {
    let note: Note = postcard::from_bytes(&adopted.note)
        .map_err(|_| "the process that pinned them was in no cluster, or of another version".to_owned())?;
    if note.version != VERSION {
        return Err("they were pinned by another version".to_owned());
    }
    if MemberId(note.local) != config.member.id {
        return Err(format!("they are member {}'s", note.local));
    }
    if note.meaning != meaning(config) {
        return Err("the cluster's name, seed, scoring, backup_site or backups has changed".to_owned());
    }
    planner.restore(&note.snapshot).map_err(|error| error.to_string())?;
    for backend in &adopted.backends {
        planner.register(*backend);
    }
    let alone = note.snapshot.ranked.iter().all(|(id, ..)| *id == note.local);
    Ok(Resumed { boot: note.boot, alone })
}

fn meaning(config: &Config) -> u64 {
    let cluster = &config.cluster;
    let mut hasher = SipHasher24::new();
    let text = format!(
        "{} {:?} {:?} {:?} {} {}",
        cluster.name,
        cluster.hash_seed,
        cluster.scoring,
        cluster.backup_site,
        cluster.backups,
        config.member.address
    );
    hasher.write(text.as_bytes());
    hasher.finish()
}
