// Package logs opens the log of a command: lines of JSON in a file that is
// rotated, and text on a console where that is wanted.
package logs

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
	"gopkg.in/natefinch/lumberjack.v2"

	"github.com/dfcache/dfcache/cmd/internal/exit"
	"github.com/dfcache/dfcache/p2p/dirs"
)

// Limits of the log files of one name.
const (
	maxSize    = 64 // MiB, of one file
	maxBackups = 5
	maxAge     = 30 // days
)

// Options says where and what to log.
type Options struct {
	Dir     string    // directory of the log files, created with the first line
	Name    string    // of the program, and of the file without ".log"
	Verbose bool      // debug level; without, info level
	Console io.Writer // gets the records as text, too; nil is off
	Warn    io.Writer // is told, once, that the file can't be written; nil is stderr
}

// Open returns a logger. Nothing is created before the first line is logged,
// so that a command with nothing to log needs no directory that can be
// written. A file that can't be written is told once, and no reason to fail.
// The caller closes the log when nobody uses the logger any more.
func Open(o Options) (*slog.Logger, io.Closer, error) {
	if o.Dir == "" || o.Name == "" || o.Name != filepath.Base(o.Name) {
		return nil, nil, exit.Usage(fmt.Errorf("there is no place for a log %q in directory %q", o.Name, o.Dir))
	}
	if o.Warn == nil {
		o.Warn = os.Stderr
	}
	options := &slog.HandlerOptions{}
	if o.Verbose {
		options.Level = slog.LevelDebug
	}
	f := &file{name: o.Name, warn: o.Warn, Logger: lumberjack.Logger{
		Filename:   filepath.Join(o.Dir, o.Name+".log"),
		MaxSize:    maxSize,
		MaxBackups: maxBackups,
		MaxAge:     maxAge,
	}}
	var handler slog.Handler = slog.NewJSONHandler(f, options)
	if o.Console != nil {
		handler = slog.NewMultiHandler(handler, slog.NewTextHandler(o.Console, options))
	}
	return slog.New(handler), f, nil
}

// file is a log file that is created with the first write. Its writes never fail.
type file struct {
	lumberjack.Logger
	name     string
	warn     io.Writer
	created  bool // guarded by the handler, which writes one line at a time
	warnOnce sync.Once
}

func (f *file) Write(line []byte) (int, error) {
	var err error
	if !f.created {
		err = create(f.Filename)
		f.created = err == nil
	}
	if f.created {
		_, err = f.Logger.Write(line)
	}
	if err != nil {
		f.warnOnce.Do(func() {
			fmt.Fprintf(f.warn, "%s: warning: the log can't be written: %v; going on without it (another place: "+
				"--logdir)\n", f.name, err)
		})
	}
	return len(line), nil
}

// create makes sure that the file is there, with the rights it should have.
// Lumberjack would do it, but lets everybody into the directory, and opens a
// new file in a way that commands that log at the same time overwrite each
// other's lines. And it would wait for the reader of a named pipe.
func create(name string) error {
	if err := dirs.Make(filepath.Dir(name), 0o750); err != nil {
		return err
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_APPEND|unix.O_NONBLOCK, 0o600)
	pipe := errors.Is(err, unix.ENXIO) // one that nobody reads
	if err == nil {
		defer f.Close()
		var info os.FileInfo
		info, err = f.Stat()
		pipe = err == nil && info.Mode()&os.ModeNamedPipe != 0
	}
	if pipe {
		err = fmt.Errorf("%s is a named pipe", name)
	}
	return err
}
