package pieces

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime/debug"
	"slices"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces/backend"
)

// openMeta opens the metadata, makes it where there is none, and brings it to
// this program's format where it has an earlier one. All of it is read and
// checked first: nothing is acknowledged on top of what is damaged.
func (s *Store) openMeta() error {
	path := s.path("meta.db")
	fresh := path + ".new" // what becomes meta.db when it is whole
	if err := os.Remove(fresh); err != nil && !backend.IsMissing(err) {
		return err
	}
	version, err := checkMetaFile(path)
	if err != nil {
		return err
	}
	if version < formatVersion {
		if version > 0 {
			s.log.Info("bringing the metadata to this program's format", "from", version, "to", formatVersion)
		}
		err := writeMeta(fresh, path, version)
		if err == nil {
			err = s.syncFile(fresh)
		}
		if err == nil {
			err = s.files.Rename(fresh, path)
		}
		if err == nil {
			err = s.files.SyncDir(s.dir)
		}
		if err != nil {
			_ = os.Remove(fresh) // as the next opening does
			return fmt.Errorf("metadata %s: %w", path, DiskError(err))
		}
	}
	if s.db, err = openBolt(path, false); err != nil {
		return err
	}
	if s.guard.file, err = backend.OpenRegular(path); err == nil {
		var newest *metaPage
		if newest, err = s.metaPages(); err == nil {
			s.guard.last.Store(newest)
			return nil
		}
		s.guard.file.Close()
	}
	s.db.Close()
	return err
}

// syncFile has the disk take in what the file at path has.
func (s *Store) syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(s.files.Sync(f), f.Close())
}

// openBolt opens a file that was checked.
func openBolt(path string, readOnly bool) (db *bbolt.DB, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer recoverDamage(&err)
	db, err = bbolt.Open(path, 0o600, &bbolt.Options{
		Timeout:      time.Second,
		FreelistType: bbolt.FreelistMapType,
		ReadOnly:     readOnly,
	})
	if errors.Is(err, berrors.ErrTimeout) {
		return nil, fmt.Errorf("metadata %s: %w: another process has it open", path, p2p.ErrUnavailable)
	}
	if err != nil {
		return nil, fmt.Errorf("metadata %s: %w", path, DiskError(err))
	}
	if readOnly {
		return db, nil
	}
	complete := true
	err = db.View(func(tx *bbolt.Tx) error {
		for _, bucket := range allBuckets {
			complete = complete && tx.Bucket(bucket) != nil
		}
		return nil
	})
	if err == nil && !complete {
		err = db.Update(createBuckets)
	}
	if err != nil {
		db.Close()
		return nil, fmt.Errorf("metadata %s: %w", path, DiskError(err))
	}
	return db, nil
}

func createBuckets(tx *bbolt.Tx) error {
	for _, bucket := range allBuckets {
		if err := createBucket(tx, bucket); err != nil {
			return err
		}
	}
	return nil
}

// errDamagedMeta says what can be done about damaged metadata.
func errDamagedMeta(path string, err error) error {
	return fmt.Errorf("metadata %s is %w: %w: nothing was changed; put the file back from a copy; or move the data "+
		"directory away, start with an empty one, and import from the old one's blobs/, where each file is named by "+
		"its digest",
		path, digest.ErrCorrupt, err)
}

// checkMetaFile reads all of the metadata and returns its format version: 0
// where there is nothing in it. Where it is damaged the error matches
// [digest.ErrCorrupt]; where this program does not know the format,
// [p2p.ErrUnavailable]. It does not need memory in proportion to what it reads.
func checkMetaFile(path string) (version uint32, err error) {
	if info, err := os.Stat(path); backend.IsMissing(err) || err == nil && info.Mode().IsRegular() && info.Size() == 0 {
		return 0, nil
	}
	c := newMetaCheck(context.Background())
	err = checkPages(path, c)
	if err == nil {
		version, err = c.finish()
	}
	if err == nil || errors.Is(err, fs.ErrPermission) || errors.Is(err, p2p.ErrUnavailable) {
		if err != nil {
			err = fmt.Errorf("metadata %s: %w", path, err)
		}
		return version, err
	}
	return 0, errDamagedMeta(path, err)
}

// metaCheck compares the records with their checksums, and the buckets with
// their sums. It is a visitor.
type metaCheck struct {
	ctx     context.Context // ends it
	buckets map[string]*bucketCheck
	current *bucketCheck
	version []byte // as it is in the file
	damage  error  // the first record that is not sealed, or not as it was
}

type bucketCheck struct {
	name   []byte
	found  bucketSum
	stated *bucketSum // from bucketSums
}

func newMetaCheck(ctx context.Context) *metaCheck {
	return &metaCheck{ctx: ctx, buckets: map[string]*bucketCheck{}}
}

func (c *metaCheck) named(name []byte) *bucketCheck {
	b := c.buckets[string(name)]
	if b == nil {
		b = &bucketCheck{name: bytes.Clone(name)}
		c.buckets[string(name)] = b
	}
	return b
}

func (c *metaCheck) bucket(name []byte, sequence uint64) error {
	known := slices.ContainsFunc(allBuckets, func(b []byte) bool { return bytes.Equal(b, name) })
	if !known && c.damage == nil {
		c.damage = fmt.Errorf("it has a bucket %q", name) // unless it is of another version
	}
	c.current = c.named(name)
	c.current.found.sequence = sequence
	return nil
}

func (c *metaCheck) record(k, sealed []byte) error {
	b := c.current
	if bytes.Equal(b.name, bucketMeta) && bytes.Equal(k, keyVersion) {
		c.version = bytes.Clone(sealed)
	}
	if b.found.records++; b.found.records%1000 == 0 && c.ctx.Err() != nil {
		return context.Cause(c.ctx)
	}
	v, sum, err := unseal(b.name, k, sealed)
	if err != nil {
		if c.damage == nil {
			c.damage = err
		}
		return nil // it may be of version 1, where nothing is sealed
	}
	b.found.sum += uint64(sum)
	if bytes.Equal(b.name, bucketSums) {
		stated, err := decodeBucketSum(v)
		if err != nil {
			return err
		}
		c.named(k).stated = &stated
	}
	return nil
}

// finish returns the version when all is read.
func (c *metaCheck) finish() (uint32, error) {
	if len(c.buckets) == 0 {
		return 0, nil // an earlier program was interrupted when it made it
	}
	if len(c.version) == 4 && c.buckets[string(bucketSums)] == nil {
		if version := binary.BigEndian.Uint32(c.version); version != 1 {
			return 0, errVersion(version)
		}
		return 1, nil
	}
	sealed, _, err := unseal(bucketMeta, keyVersion, c.version)
	if err != nil || len(sealed) != 4 {
		return 0, fmt.Errorf("its version is not what was written")
	}
	if version := binary.BigEndian.Uint32(sealed); version != formatVersion {
		return 0, errVersion(version)
	}
	if c.damage != nil {
		return 0, c.damage
	}
	for _, b := range c.buckets {
		switch {
		case bytes.Equal(b.name, bucketSums):
			if b.found.sequence != 0 {
				return 0, fmt.Errorf("bucket %s has given out a number", b.name)
			}
		case b.stated == nil:
			return 0, fmt.Errorf("bucket %s has no sum", b.name)
		case *b.stated != b.found:
			return 0, fmt.Errorf("bucket %s has %d records that add up to %x, number %d; written were %d with %x, "+
				"number %d", b.name,
				b.found.records, b.found.sum, b.found.sequence, b.stated.records, b.stated.sum, b.stated.sequence)
		}
	}
	return formatVersion, nil
}

func errVersion(version uint32) error {
	return fmt.Errorf("%w: its format is version %d, this program knows versions 1 to %d: use the dfcache that wrote "+
		"it, or another directory", p2p.ErrUnavailable, version, formatVersion)
}

// migrateBatch is how many records a migration writes in one transaction.
const migrateBatch = 10_000

// writeMeta makes a metadata file at path, with what the one at old has, which
// is of an earlier version; 0 for one that has nothing. Until it is on disk, and is
// put in old's place, old is what counts.
func writeMeta(path, old string, version uint32) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer recoverDamage(&err)
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{
		Timeout: time.Second, FreelistType: bbolt.FreelistMapType, NoSync: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	if err := db.Update(createBuckets); err != nil {
		return err
	}
	if version == 1 {
		if err := migrate1(db, old); err != nil {
			return err
		}
	}
	return db.Update(func(tx *bbolt.Tx) error {
		return putValue(tx, bucketMeta, keyVersion, binary.BigEndian.AppendUint32(nil, formatVersion))
	})
}

// migrate1 copies the records of version 1, which has no checksums, and counts
// the bytes of all blobs anew: its programs have counted some of them twice.
func migrate1(db *bbolt.DB, old string) error {
	from, err := bbolt.Open(old, 0o600, &bbolt.Options{Timeout: time.Second, ReadOnly: true})
	if err != nil {
		return err
	}
	defer from.Close()
	var stored int64
	err = from.View(func(source *bbolt.Tx) error {
		for _, bucket := range allBuckets {
			b := source.Bucket(bucket)
			if b == nil {
				continue // it came in later
			}
			var k, v []byte
			for c, more := b.Cursor(), true; more; {
				err := db.Update(func(tx *bbolt.Tx) error {
					tx.Bucket(bucket).FillPercent = 0.9
					if err := tx.Bucket(bucket).SetSequence(b.Sequence()); err != nil {
						return err
					}
					if k == nil {
						k, v = c.First()
					}
					for n := 0; k != nil && n < migrateBatch; n++ {
						if bytes.Equal(bucket, bucketBlobs) {
							var blob blobRecord
							if err := json.Unmarshal(v, &blob); err != nil {
								return fmt.Errorf("%w: record %q in bucket %s: %w", digest.ErrCorrupt, k, bucket, err)
							}
							stored += blob.Size
						}
						if err := putValue(tx, bucket, k, v); err != nil {
							return err
						}
						k, v = c.Next()
					}
					more = k != nil
					return addToBucket(tx, bucket, bucketSum{sequence: b.Sequence()})
				})
				if err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return db.Update(func(tx *bbolt.Tx) error {
		return putValue(tx, bucketMeta, keyBytes, binary.BigEndian.AppendUint64(nil, uint64(stored)))
	})
}
